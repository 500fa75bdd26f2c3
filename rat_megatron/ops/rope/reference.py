"""RoPE in torch, the definition: that of the model that travels (rat_megatron.ratplus), on Megatron's layout."""

from __future__ import annotations

from torch import Tensor

from rat_megatron.ratplus.rotary_ratplus import apply_rotary


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [s, b, groups, width] by cos and sin [s, hn / 2]."""
    heads = x.unflatten(-1, (-1, 2 * cos.shape[1]))  # [s, b, groups, width / hn, hn]
    return apply_rotary(heads, cos[:, None, None, None], sin[:, None, None, None]).flatten(-2)
