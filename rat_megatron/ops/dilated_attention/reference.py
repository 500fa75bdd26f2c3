"""Attention under a positional pattern in torch: masked, which is the definition, and over the kept keys alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from rat_megatron.ratplus.pattern import HeadPattern

# Consecutive queries that share one gathered set of keys: fewer waste less on masked keys, more make fewer calls. Measured.
_BLOCK = 64


def masked_attention(q: Tensor, k: Tensor, v: Tensor, head: HeadPattern, softmax_scale: float, q_at: Tensor, k_at: Tensor) -> Tensor:
    """All [sq, sk] scores, of which the pattern's mask leaves those seen. q [sq, b, np, hn], k and v [sk, b, ng, hn] at positions."""
    return _sdpa(q, k, v, softmax_scale, attn_mask=head.mask(q_at[:, None], k_at))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Dense attention of the last sq tokens of a sequence: q [sq, b, np, hn], k and v [sk, b, ng, hn]."""
    if len(q) == len(k):
        return _sdpa(q, k, v, softmax_scale, is_causal=True)
    if q.is_cuda:  # a bias that torch's kernels take without a [sq, sk] mask, where they run
        return _sdpa(q, k, v, softmax_scale, attn_mask=causal_lower_right(len(q), len(k)))
    return _sdpa(q, k, v, softmax_scale, attn_mask=torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q)))


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, kept_k: Tensor, kept_v: Tensor, kept_at: Tensor, head: HeadPattern, softmax_scale: float, start: int
) -> Tensor:
    """As the package's, without [s, s] scores or mask.

    Every block of queries runs one softmax over two sets of keys: the blocks that its window reaches, in full, and before them only
    the dilated and sink keys. The exact mask over this short list of keys decides.
    """
    before = k.shape[0] - q.shape[0]
    at = torch.arange(start - before, start + q.shape[0])
    # Blocks come from one split, so that backward writes every gradient once, not a full-length one for every block.
    sizes = _block_sizes(before)[::-1] + _block_sizes(q.shape[0])
    blocks_k, blocks_v, blocks_at = k.split(sizes), v.split(sizes), at.split(sizes)
    first = len(_block_sizes(before))  # the block of keys at which the queries begin
    reach = -(-head.window // _BLOCK)

    outputs = []
    for i, q_block in enumerate(q.split(_BLOCK), start=first):
        local = slice(max(0, i - reach), i + 1)
        old = int(torch.searchsorted(kept_at, int(blocks_at[local.start][0])))
        keys = torch.cat([kept_k[:old], *blocks_k[local]])
        values = torch.cat([kept_v[:old], *blocks_v[local]])
        mask = head.mask(blocks_at[i][:, None], torch.cat([kept_at[:old], *blocks_at[local]]))
        outputs.append(_sdpa(q_block, keys, values, softmax_scale, attn_mask=mask.to(q.device)))
    return torch.cat(outputs)


def _block_sizes(length: int) -> list[int]:
    return [_BLOCK] * (length // _BLOCK) + [length % _BLOCK] * (length % _BLOCK > 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **mask) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [s, b, heads, hn] -> [b, heads, s, hn]
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1], **mask)
    return out.permute(2, 0, 1, 3)
