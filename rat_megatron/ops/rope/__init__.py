"""Rotary position embedding of whole sequences (rotate-half). Other kernels turn what they hold anyway."""

from __future__ import annotations

import torch

from rat_megatron.ops.dispatch import choose


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, implementation: str | None = None) -> torch.Tensor:
    """x [s, b, groups, width], a group of width / hn heads, turned by cos and sin [s, hn / 2]: in fp32 (float64), rounded once.

    ``implementation`` overrides the choice: "triton", one pass over memory, which has no gradient, or "torch", which has one.
    """
    if implementation is None and torch.is_grad_enabled() and x.requires_grad:
        implementation = "torch"
    return choose(__name__, implementation, x[..., : 2 * cos.shape[-1]]).apply_rope(x, cos, sin)


def check_rope(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """Raises ValueError unless cos and sin are both absent or both [s, hn / 2] for x [s, b, heads, hn]."""
    if (cos is None) != (sin is None):
        raise ValueError("RoPE needs both cos and sin")
    if cos is not None and (x.shape[3] % 2 or not cos.shape == sin.shape == (x.shape[0], x.shape[3] // 2)):
        raise ValueError(
            f"cos and sin must be [s, hn / 2], not {list(cos.shape)} and {list(sin.shape)} for keys or queries {list(x.shape)}"
        )
