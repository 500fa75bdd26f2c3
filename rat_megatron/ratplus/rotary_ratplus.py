"""Rotary position embedding, rotate-half, in plain torch. Source: arXiv 2104.09864; RAT+ (arXiv 2602.18196) turns recurrent keys."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch

_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""What rotary_scaling holds, by its rope_type."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or unchanged when it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: torch.device):
    """A context for code that says itself in which precision it computes."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_scaling(scaling: dict | None) -> None:
    """Raises ValueError for a rotary_scaling that is of no type known here, or lacks what its type needs."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in _NEEDED:
        raise ValueError(f"rotary_scaling has rope_type {kind!r}: {', '.join(_NEEDED)} are supported")
    for name in _NEEDED[kind]:
        if not isinstance(scaling.get(name), (int, float)):
            raise ValueError(f"rotary_scaling of rope_type '{kind}' has no number for {name}")


def rotary_tables(positions: torch.Tensor, config: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [b, 1, t, hn / 2] for positions [b, t], in fp32, or in ``dtype`` if that is float64.

    Channels that config.rotary_percent leaves alone come last (channel_order), with angle 0.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    frequency, scale = _frequencies(config, positions.device, dtype)
    angle = positions[:, None, :, None] * frequency
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rest = config.head_dim // 2 - len(frequency)
    if rest:
        cos, sin = torch.nn.functional.pad(cos, (0, rest), value=1.0), torch.nn.functional.pad(sin, (0, rest))
    return cos, sin


def without_rotation(tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of the same shape that leave everything as it is, for layers without RoPE."""
    return torch.ones_like(tables[0]), torch.zeros_like(tables[1])


def channel_order(config: Any) -> list[int] | None:
    """A head's channels in the order in which RoPE's pairs are c and c + hn / 2, those that it leaves alone last; None: as they are.

    Partial RoPE pairs channels c and c + r / 2 of the first r. Attention and recurrence are the same in any order.
    """
    turned = int(config.head_dim * config.rotary_percent)
    if turned == config.head_dim:
        return None
    half, rest = turned // 2, (config.head_dim - turned) // 2
    channels = list(range(config.head_dim))
    return channels[:half] + channels[turned : turned + rest] + channels[half:turned] + channels[turned + rest :]


def _frequencies(config: Any, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Of each turned pair, in radians a position; and the factor of cosines and sines. Scaled as Transformers' modeling_rope_utils."""
    turned, base = int(config.head_dim * config.rotary_percent), config.rope_theta
    frequency = 1.0 / base ** (torch.arange(0, turned, 2, device=device, dtype=dtype) / turned)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequency, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":  # arXiv 2306.15595
        return frequency / factor, 1.0
    if scaling["rope_type"] == "llama3":
        low, high, original = (scaling[name] for name in _NEEDED["llama3"][1:])
        turns = original * frequency / (2 * math.pi)  # over the original length
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:  # YaRN, arXiv 2309.00071
        original = scaling["original_max_position_embeddings"]
        fast, slow = scaling.get("beta_fast") or 32.0, scaling.get("beta_slow") or 1.0
        first, last = (turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, turned - 1)
        pair = torch.arange(turned // 2, device=device, dtype=dtype)
        kept = 1 - ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor), attention_factor(scaling)


def attention_factor(scaling: dict | None) -> float:
    """By which YaRN scales cosines and sines, and so queries and keys."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def concentration(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    of, of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return concentration(of) / concentration(of_all) if of and of_all else concentration()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., hn] by cos and sin that broadcast to [..., hn / 2]: in fp32 (float64), rounded once to the type of x."""
    low, high = wide(x).chunk(2, dim=-1)
    cos, sin = cos.to(low.dtype), sin.to(low.dtype)
    return torch.cat([(low * cos - high * sin).to(x.dtype), (high * cos + low * sin).to(x.dtype)], dim=-1)
