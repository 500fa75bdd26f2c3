"""Top-k block attention: every query sees a few blocks of keys in full, chosen by score; a torch implementation.

Sources: the top-k hybrid of RAT+ (arXiv 2602.18196), whose exact scoring is not public; scores as in Quest (arXiv 2406.10774).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rat_megatron.ratplus.pattern import HeadPattern

_QUERIES = 256  # queries whose masks are in memory at a time


def topk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head: HeadPattern,
    softmax_scale: float,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
) -> torch.Tensor:
    """Attention of patterns such as d64k8 and d64k8+d. q [b, np, sq, hn], k and v [b, ng, sk, hn]; returns [b, np, sq, hn].

    Our choice of scores is Quest's: with kmax and kmin the elementwise bounds of the keys (after RoPE) of a block, a query scores the
    block sum_d max(q_d * kmax_d, q_d * kmin_d), an upper bound of its products with those keys. Of the K blocks, one is the query's
    own up to the query, one the first, and the rest the complete past blocks of highest score, for every query and query head apart.
    ``dilate_rest`` adds every D-th key. The selection is not differentiated. Positions are int64 [sq] and [sk] in any order; the
    keys must hold every position up to that of the last query.
    """
    # As many blocks as the keys can fill, and one for keys past them, which no query sees: reading the last position would wait for the
    # device.
    count = -(-k.shape[2] // head.dilation)
    k_blocks = (k_positions // head.dilation).clamp(max=count)
    with torch.no_grad():
        upper, lower = _block_bounds(k, k_blocks, count + 1)
    outputs = []
    for queries, at in zip(q.split(_QUERIES, dim=2), q_positions.split(_QUERIES), strict=True):
        with torch.no_grad():
            chosen = _choose_blocks(_scores(queries, upper, lower), at // head.dilation, head.blocks)
            seen = chosen[..., k_blocks]  # [..., sq, blocks] -> [..., sq, sk]
            if head.dilate_rest:
                seen = seen | ((k_positions + 1) % head.dilation == 0)
            seen = seen & (k_positions <= at[:, None])
        gqa = q.shape[1] != k.shape[1]
        outputs.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=gqa))
    return torch.cat(outputs, dim=2)


def _block_bounds(k: torch.Tensor, block: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elementwise maximum and minimum of the keys of each of ``count`` blocks, fp32 or float64. k [b, ng, sk, hn] -> [b, ng, count, hn]."""
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    bounds = k.new_zeros(*k.shape[:2], count, k.shape[3])
    index = block[:, None].expand_as(k)
    upper, lower = (bounds.scatter_reduce(2, index, k, reduce, include_self=False) for reduce in ("amax", "amin"))
    return upper, lower


def _scores(q: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """sum_d max(q_d * upper_d, q_d * lower_d): the sign of q_d says which bound wins. [b, np, sq, hn] -> [b, np, sq, blocks]."""
    q = q.to(upper.dtype).unflatten(1, (upper.shape[1], -1))  # [b, ng, np/ng, sq, hn]
    scores = q.clamp(min=0) @ upper.mT[:, :, None] + q.clamp(max=0) @ lower.mT[:, :, None]
    return scores.flatten(1, 2)


def _choose_blocks(scores: torch.Tensor, own: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` blocks that a query sees. scores [b, np, sq, blocks], own block [sq]; broadcasts to the scores' shape."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    own = own[:, None]
    chosen = block == own
    if count >= 2:
        chosen = chosen | (block == 0)
    if count >= 3:
        candidates = (block > 0) & (block < own)
        best = scores.masked_fill(~candidates, -torch.inf).topk(min(count - 2, len(block)), dim=-1).indices
        chosen = chosen | (torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & candidates)
    return chosen
