"""Rotary position embedding of keys and queries in torch. rope_triton.py does it in one pass; other kernels turn what they hold."""

from __future__ import annotations

import torch


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE of x [..., hn] by cos and sin that broadcast to [..., hn / 2]: in fp32 (float64), rounded once to the type of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([(low * cos - high * sin).to(x.dtype), (high * cos + low * sin).to(x.dtype)], dim=-1)


def check_rope(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """Raises ValueError unless cos and sin are both absent or both [s, hn / 2] for x [s, b, heads, hn]."""
    if (cos is None) != (sin is None):
        raise ValueError("RoPE needs both cos and sin")
    if cos is not None and (x.shape[3] % 2 or not cos.shape == sin.shape == (x.shape[0], x.shape[3] // 2)):
        raise ValueError(
            f"cos and sin must be [s, hn / 2], not {list(cos.shape)} and {list(sin.shape)} for keys or queries {list(x.shape)}"
        )
