"""Rotary position embedding, rotate-half, in plain torch. Source: arXiv 2104.09864; RAT+ (arXiv 2602.18196) turns recurrent keys."""

from __future__ import annotations

from contextlib import nullcontext

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or unchanged when it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: torch.device):
    """A context for code that says itself in which precision it computes."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def rotary_tables(positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [b, 1, t, hn / 2] for positions [b, t], in fp32, or in ``dtype`` if that is float64."""
    dtype = torch.promote_types(dtype, torch.float32)
    inverse_frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim)
    angle = positions[:, None, :, None] * inverse_frequency
    return angle.cos(), angle.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., hn] by cos and sin that broadcast to [..., hn / 2]: in fp32 (float64), rounded once to the type of x."""
    low, high = wide(x).chunk(2, dim=-1)
    cos, sin = cos.to(low.dtype), sin.to(low.dtype)
    return torch.cat([(low * cos - high * sin).to(x.dtype), (high * cos + low * sin).to(x.dtype)], dim=-1)
