"""One token a row over a compact key/value cache, S + W + 1 + T / D entries instead of T. Source: RAT+ (arXiv 2602.18196)."""

from __future__ import annotations

import torch
from torch import Tensor

from rat_megatron.ops.dispatch import choose
from rat_megatron.ratplus.head_cache_ratplus import HeadCache


@torch.no_grad()
def decode_step(
    q: Tensor,
    f: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: HeadCache,
    lengths: Tensor,
    softmax_scale: float,
    implementation: str | None = None,
) -> Tensor:
    """One token of every row through recurrence, RoPE, cache and attention; updates the cache in place and leaves lengths alone.

    q [b, np, hn] and f (gate logits), k, v [b, ng, hn]: the projections of the row's token at position lengths[b] (int32 or int64, on the
    device; layers share it, and the caller increments it after the last), before RoPE. cos and sin [b, hn / 2] of that position. np is a
    multiple of ng and head h reads group h // (np // ng). Returns [b, np, hn] in the type of q. Gate, state, RoPE and softmax are fp32
    (float64 for a float64 cache). A row with lengths[b] >= cache.max_length gets no error, for that would wait for the device: keys that
    no longer fit are dropped. ``implementation`` overrides the choice: "triton" or "torch". Raises ValueError when shapes do not fit
    together, and for top-k patterns.
    """
    _check(q, f, k, v, cos, sin, cache, lengths)
    return choose(__name__, implementation, q, cache.k).decode_step(q, f, k, v, cos, sin, cache, lengths, softmax_scale)


def _check(q, f, k, v, cos, sin, cache: HeadCache, lengths) -> None:
    """Raises ValueError unless the arguments of decode_step fit together."""
    if cache.head.blocks:
        raise ValueError(f"attention pattern '{cache.head}' chooses keys by score: its tokens are not decoded here")
    batch, groups, _, head_dim = cache.k.shape
    if not f.shape == k.shape == v.shape == (batch, groups, head_dim):
        raise ValueError(f"f, k and v must have the cache's shape {[batch, groups, head_dim]}, not {[list(x.shape) for x in (f, k, v)]}")
    if q.dim() != 3 or (q.shape[0], q.shape[2]) != (batch, head_dim) or q.shape[1] % groups:
        raise ValueError(f"q {list(q.shape)} does not fit a cache of {batch} rows, {groups} key heads and head dimension {head_dim}")
    if not cos.shape == sin.shape == (batch, head_dim // 2) or lengths.shape != (batch,):
        shapes = [list(x.shape) for x in (cos, sin, lengths)]
        raise ValueError(f"cos, sin and lengths must be {[batch, head_dim // 2]} twice and {[batch]}, not {shapes}")
