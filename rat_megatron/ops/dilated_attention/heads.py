"""Layers whose heads have patterns of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rat_megatron.ratplus.pattern import HeadPattern, LayerPattern


def attend_by_head(
    q: Tensor, k: Tensor, v: Tensor, pattern: LayerPattern, attend: Callable[[HeadPattern, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """attend(head pattern, q, k, v) once for every pattern of a layer, with the heads that have it; all [s, b, heads, hn].

    Split and joined by head: an index of heads would be copied from the host in every step, which no CUDA graph can hold.
    """
    if pattern.is_uniform:
        return attend(pattern.heads[0], q, k, v)
    q_heads, k_heads, v_heads = (x.split(1, dim=2) for x in (q, k, v))
    share = len(q_heads) // len(k_heads)
    outputs: dict[int, Tensor] = {}
    for head in dict.fromkeys(pattern.heads):
        members = [h for h in range(len(q_heads)) if pattern.heads[h] == head]
        queries = torch.cat([q_heads[h] for h in members], dim=2)
        keys, values = (torch.cat([x[h // share] for h in members], dim=2) for x in (k_heads, v_heads))
        outputs |= zip(members, attend(head, queries, keys, values).split(1, dim=2), strict=True)
    return torch.cat([outputs[h] for h in range(len(q_heads))], dim=2)
