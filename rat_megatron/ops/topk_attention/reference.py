"""Top-k block attention in torch, the definition: that of the model that travels (rat_megatron.ratplus), at any positions."""

from __future__ import annotations

import torch
from torch import Tensor

from rat_megatron.ratplus.attention_ratplus import attend_to_blocks, block_summary
from rat_megatron.ratplus.pattern import HeadPattern


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: HeadPattern,
    softmax_scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> Tensor:
    if k_positions is not None:
        order = k_positions.argsort()  # every position up to the last query's is there, so a key's place is then its position
        k, v = k[:, :, order], v[:, :, order]
    if q_positions is None:
        q_positions = torch.arange(q.shape[2], device=q.device)
    bounds = block_summary(k, head.dilation, "bounds")
    return attend_to_blocks(q, k, v, bounds, q_positions[None], head, "bounds", softmax_scale)
