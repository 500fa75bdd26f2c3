"""Triton kernels of one decode step over a compact cache. Source: RAT+ (arXiv 2602.18196)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    q, f, k, v, cos, sin, k_cache, v_cache, state, lengths, out, partial, bounds,
    q_batch, q_head, f_batch, f_head, k_batch, k_head, v_batch, v_head, cos_batch, sin_batch,
    scale, batch, groups, capacity,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr,  # the power of two that holds HEAD_DIM
    SINKS: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, DILATION: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row and key head, and its share of the entries; the first share includes the token itself and stores it."""
    b, group, split = tl.program_id(0) // groups, tl.program_id(0) % groups, tl.program_id(1)
    t = tl.load(lengths + b).to(tl.int32)
    cache_at = tl.program_id(0).to(tl.int64) * capacity * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, LANES)
    real = d < HEAD_DIM
    partner, sign = (d + HALF) % HEAD_DIM, tl.where(d < HALF, -1.0, 1.0)  # rotate-half: x_d cos + sign x_partner sin
    first, mine = tl.where(split == 0, 1.0, 0.0), d + split * LANES < HEAD_DIM  # vector masks: the interpreter has no others
    row_cos = tl.load(cos + b * cos_batch + d % HALF, mask=real, other=0.0).to(tl.float32)
    row_sin = tl.load(sin + b * sin_batch + d % HALF, mask=real, other=0.0).to(tl.float32) * sign

    # The token: new state, key and value. Other shares leave the state unread, since the first one overwrites it.
    f_at, k_at, v_at = f + b * f_batch + group * f_head, k + b * k_batch + group * k_head, v + b * v_batch + group * v_head
    state_k = state + tl.program_id(0) * HEAD_DIM
    state_v = state_k + batch * groups * HEAD_DIM
    new_k = _recur(f_at, k_at, state_k, d, mine)
    other_k = _recur(f_at, k_at, state_k, partner, mine)
    new_v = _recur(f_at, v_at, state_v, d, mine)
    key = (new_k * row_cos + other_k * row_sin).to(k_cache.dtype.element_ty)
    value = new_v.to(v_cache.dtype.element_ty)

    row = tl.arange(0, TILE_ROWS)[:, None]
    q_at = q + b * q_batch + (group * ROWS + row) * q_head
    ours = (row < ROWS) & real[None, :]
    queries = tl.load(q_at + d[None, :], mask=ours, other=0.0).to(tl.float32) * row_cos[None, :]
    queries += tl.load(q_at + partner[None, :], mask=ours, other=0.0).to(tl.float32) * row_sin[None, :]
    queries *= scale  # exponents are to base 2

    # Entries in use are a prefix of the slots: as long as the ring is not full, no dilated token has left the window.
    entries = tl.minimum(t, SINKS + RING)
    if DILATION > 0:
        entries += tl.maximum((t - WINDOW) // DILATION - SINKS // DILATION, 0)
    entries = tl.minimum(entries, capacity)
    share = tl.cdiv(tl.cdiv(entries, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, entries)
    here = SINKS + (t - SINKS) % RING if RING > 0 else -1  # the token's place in the ring: whoever holds it has left the window
    top, total, mixed = _attend(
        queries, k_cache + cache_at, v_cache + cache_at, begin, end, here, TILE_ROWS, HEAD_DIM, LANES, BLOCK, STAGES
    )

    own = tl.sum(queries * key.to(tl.float32)[None, :], axis=1) + (first - 1.0) * 1e30
    new_top = tl.maximum(top, own)
    shrink, weight = tl.exp2(top - new_top), tl.exp2(own - new_top) * first
    total = total * shrink + weight
    mixed = mixed * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
    heads = tl.program_id(0) * ROWS + row
    if SPLITS == 1:
        result = mixed / total[:, None]
        tl.store(out + heads * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=ours)
    else:
        at = heads * SPLITS + split
        tl.store(partial + at * HEAD_DIM + d[None, :], mixed, mask=ours)
        tl.store(bounds + at, new_top[:, None], mask=row < ROWS)
        tl.store(bounds + batch * groups * ROWS * SPLITS + at, total[:, None], mask=row < ROWS)

    tl.debug_barrier()  # every thread has read the old state
    tl.store(state_k + d, new_k, mask=mine)
    tl.store(state_v + d, new_v, mask=mine)
    if SINKS > 0:
        _write(k_cache + cache_at, v_cache + cache_at, key, value, t, (split == 0) & (t < SINKS), capacity, HEAD_DIM, LANES)
    if RING > 0:
        _write(k_cache + cache_at, v_cache + cache_at, key, value, here, (split == 0) & (t >= SINKS), capacity, HEAD_DIM, LANES)
    if DILATION > 0:
        slot = SINKS + RING + (t + 1) // DILATION - 1 - SINKS // DILATION
        dilated = (split == 0) & (t >= SINKS) & ((t + 1) % DILATION == 0)
        _write(k_cache + cache_at, v_cache + cache_at, key, value, slot, dilated, capacity, HEAD_DIM, LANES)


@triton.jit
def _recur(f, x, state, d, active):
    """g * state + (1 - g) * x in fp32 at the channels d; 0 where not active."""
    logit = tl.load(f + d, mask=active, other=0.0).to(tl.float32)
    old = tl.load(state + d, mask=active, other=0.0)
    new = tl.load(x + d, mask=active, other=0.0).to(tl.float32)
    return old / (1.0 + tl.exp(-logit)) + new / (1.0 + tl.exp(logit))


@triton.jit
def _write(k_cache, v_cache, key, value, slot, wanted, capacity, HEAD_DIM: tl.constexpr, LANES: tl.constexpr):
    d = tl.arange(0, LANES)
    slot = tl.where(wanted, slot, capacity)
    at = slot * HEAD_DIM + d
    tl.store(k_cache + at, key, mask=(at < capacity * HEAD_DIM) & (d < HEAD_DIM))
    tl.store(v_cache + at, value, mask=(at < capacity * HEAD_DIM) & (d < HEAD_DIM))


@triton.jit
def _attend(
    queries, k_cache, v_cache, begin, end, here,
    TILE_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries [TILE_ROWS, hn], 16 or more for a dot, over the entries begin to end: exponent bounds, sums and weighted values."""
    d = tl.arange(0, LANES)
    queries = queries.to(k_cache.dtype.element_ty)
    top = tl.full([TILE_ROWS], -1e30, tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, LANES], tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK)
        seen = (slot < end) & (slot != here)
        at = slot[:, None] * HEAD_DIM + d[None, :]
        stored = seen[:, None] & (d < HEAD_DIM)[None, :]
        keys = tl.load(k_cache + at, mask=stored, other=0.0)
        values = tl.load(v_cache + at, mask=stored, other=0.0)
        scores = tl.where(seen[None, :], tl.dot(queries, tl.trans(keys), input_precision="ieee"), -1e30)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - new_top)
        weight = tl.where(seen[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        top = new_top
    return top, total, mixed


@triton.jit
def merge_kernel(partial, bounds, out, heads, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Joins the shares of one query head."""
    head, d = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    share = tl.arange(0, TILE)
    at = head * SPLITS + share
    top = tl.load(bounds + at, mask=share < SPLITS, other=-1e30)
    total = tl.load(bounds + heads * SPLITS + at, mask=share < SPLITS, other=0.0)
    stored = (share[:, None] < SPLITS) & (d < HEAD_DIM)[None, :]
    mixed = tl.load(partial + at[:, None] * HEAD_DIM + d[None, :], mask=stored, other=0.0)
    weight = tl.exp2(top - tl.max(top, axis=0))
    result = tl.sum(mixed * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out + head * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
