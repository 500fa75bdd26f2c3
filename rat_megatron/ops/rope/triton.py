"""RoPE in one pass over memory, without gradients."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rat_megatron.ops.rope.kernels import rope_turn


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, back: bool = False) -> Tensor:
    """x [s, b, groups, width] by cos and sin [s, hn / 2], where a group has width / hn heads; fp32 inside, rounded once.

    ``back`` turns the other way, as gradients do. Writes to ``out``, of x's shape and any strides but the last, or to a new contiguous
    tensor; returns it.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    cos, sin = cos.contiguous(), sin.contiguous()
    length, batch, groups, width = x.shape
    half = cos.shape[1]
    heads = width // (2 * half)
    if x.numel():
        rope_turn[(batch * groups * heads, triton.cdiv(length, 32))](
            x, out, cos, sin, length, groups, *x.stride()[:3], *out.stride()[:3],
            HEADS=heads, HALF=half, LANES=triton.next_power_of_2(half), BACK=back, ROWS=32, num_warps=4,
        )  # fmt: skip
    return out
