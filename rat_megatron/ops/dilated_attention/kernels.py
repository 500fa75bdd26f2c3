"""Triton kernels of dilated attention: forward, gradients of the queries, gradients of the keys.

A query sees its band, the W keys before it and itself, and of the kept list (sinks, then dilated keys) those older than the band.
Source: RAT+ (arXiv 2602.18196), dilated attention with local window and sinks.
"""

import triton
import triton.language as tl

# Positions count from the start of the sequence; rows and entries index the tensor at hand. Scores are in units of log 2.

_HEADS_TOGETHER = tl.constexpr(64)  # measured on an H100
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_VARYING = ["rows", "start", "length", "base", "entries", "old_from", "splits", "kept_before"]  # no recompilation for these


@triton.jit
def _entries_before(position, D: tl.constexpr, S: tl.constexpr):
    """How many entries of the kept list lie before a position."""
    count = tl.minimum(tl.maximum(position, 0), S)
    if D > 0:
        count += tl.maximum(tl.maximum(position, 0) // D - S // D, 0)
    return count


@triton.jit
def _position_of(entry, D: tl.constexpr, S: tl.constexpr):
    if D > 0:
        return tl.where(entry < S, entry, (entry - S + S // D + 1) * D - 1)
    else:
        return entry


@triton.jit
def _sees(position, key, base, count, BAND: tl.constexpr, D: tl.constexpr, SKIP: tl.constexpr, W: tl.constexpr, S: tl.constexpr):
    """Whether queries at these positions see these local keys (BAND) or these entries of the kept list."""
    if BAND:
        distance = position - (base + key)
        return (distance >= 0) & (distance <= W) & (key < count)
    else:
        at = _position_of(key, D, S)
        seen = (at < position - W) & (key < count)
        if SKIP > 0:
            seen = seen & ((at + 1) % SKIP != 0)
        return seen


@triton.jit
def _load(x, row, stride, count, HN: tl.constexpr):
    """Rows [n] of x as [n, HN], zeros from row ``count`` on."""
    at = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, HN)[None, :]
    return tl.load(at, mask=(row < count)[:, None], other=0.0)


@triton.jit
def _load_turned(x, row, stride, count, cos, sin, HN: tl.constexpr):
    """_load() with rotate-half RoPE by tables [count, HN / 2]; rounded to the type of x."""
    HALF: tl.constexpr = HN // 2
    there = (row < count)[:, None]
    column = tl.arange(0, HALF)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride + column
    angle = row.to(tl.int64)[:, None] * HALF + column
    low = tl.load(at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    halves = tl.join((low * c - high * s).to(x.dtype.element_ty), (high * c + low * s).to(x.dtype.element_ty))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (row.shape[0], HN))


@triton.jit
def _store(x, row, stride, count, value, HN: tl.constexpr):
    at = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, HN)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(row < count)[:, None])


@triton.jit
def _assignment():
    """The head, counted over all sequences, and the block of queries of this program.

    Heads come in groups small enough that their kept keys stay in L2, and each group goes through all queries before the next. Later
    queries come first: they have the longest pasts, and the last programs to start should be short.
    """
    linear = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    first = linear // (_HEADS_TOGETHER * tl.num_programs(1)) * _HEADS_TOGETHER
    heads = tl.minimum(_HEADS_TOGETHER, tl.num_programs(0) - first)
    linear -= first * tl.num_programs(1)
    return first + linear % heads, tl.num_programs(1) - 1 - linear // heads


@triton.jit
def _attend(
    top, total, acc, q, k, v, k_s, v_s, lo, hi, position, base, scale, MASKED: tl.constexpr, BAND: tl.constexpr, D: tl.constexpr,
    SKIP: tl.constexpr, W: tl.constexpr, S: tl.constexpr, HN: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes keys lo to hi into an online softmax: its largest score so far, its sum and its weighted values."""
    for first in range(lo, hi, BN):
        key = first + tl.arange(0, BN)
        k_tile = _load(k, key, k_s, hi, HN)
        v_tile = _load(v, key, v_s, hi, HN)
        score = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            seen = _sees(position[:, None], key[None, :], base, hi, BAND, D, SKIP, W, S)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit(do_not_specialize=_VARYING)
def dilated_attention_forward(
    q, k, v, kept_k, kept_v, out, lse, old_out, old_lse, cos, sin,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, kk_s, kk_b, kk_h, kv_s, kv_b, kv_h,
    lse_h, heads, rows, start, length, base, entries, old_from, scale, D: tl.constexpr, SKIP: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GROUP: tl.constexpr, HN: tl.constexpr, PRECISION: tl.constexpr, OLD: tl.constexpr, ROPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out and lse of a block of queries of one head, which ROPE turns by cos and sin first.

    OLD: a part of the keys is already in old_out and old_lse.
    """
    flat, block = _assignment()
    sequence, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    q += sequence * q_b + head * q_h
    k += sequence * k_b + head // GROUP * k_h
    v += sequence * v_b + head // GROUP * v_h
    first = block * BM
    row = first + tl.arange(0, BM)
    position = start + row
    scale *= _LOG2_E
    if ROPE:
        q_tile = _load_turned(q, row, q_s, rows, cos, sin, HN)
    else:
        q_tile = _load(q, row, q_s, rows, HN)

    if W == 0:  # the own key opens the softmax
        own = position - base
        top = tl.sum(q_tile.to(tl.float32) * _load(k, own, k_s, length, HN).to(tl.float32), 1) * scale
        total = tl.full([BM], 1.0, tl.float32)
        acc = _load(v, own, v_s, length, HN).to(tl.float32)
    else:
        top = tl.full([BM], -1e30, tl.float32)  # finite: a query may see nothing of its first tile
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, HN], tl.float32)
    if OLD:
        there = (row >= old_from) & (row < rows)
        score = tl.load(old_lse + flat.to(tl.int64) * (rows - old_from) + row - old_from, mask=there, other=float("-inf"))
        higher = tl.maximum(top, score * _LOG2_E)
        fade, weight = tl.exp2(top - higher), tl.exp2(score * _LOG2_E - higher)
        at = (row - old_from).to(tl.int64)[:, None] * (tl.num_programs(0) * HN) + flat * HN + tl.arange(0, HN)[None, :]
        acc = acc * fade[:, None] + tl.load(old_out + at, mask=there[:, None], other=0.0).to(tl.float32) * weight[:, None]
        top, total = higher, total * fade + weight

    if D > 0 or S > 0:
        kk = kept_k + sequence * kk_b + head // GROUP * kk_h
        kv = kept_v + sequence * kv_b + head // GROUP * kv_h
        full = _entries_before(start + first - W, D, S) // BN * BN  # entries that every query here sees
        if SKIP > 0:
            full = full * 0
        some = tl.minimum(_entries_before(start + tl.minimum(first + BM, rows) - 1 - W, D, S), entries)
        top, total, acc = _attend(
            top, total, acc, q_tile, kk, kv, kk_s, kv_s, 0, full, position, base, scale, False, False, D, SKIP, W, S, HN, BN,
            PRECISION,
        )  # fmt: skip
        top, total, acc = _attend(
            top, total, acc, q_tile, kk, kv, kk_s, kv_s, full, some, position, base, scale, True, False, D, SKIP, W, S, HN, BN,
            PRECISION,
        )  # fmt: skip
    if W > 0:
        oldest = tl.maximum(start + first - W - base, 0)
        newest = start + tl.minimum(first + BM, rows) - base
        top, total, acc = _attend(
            top, total, acc, q_tile, k, v, k_s, v_s, oldest, newest, position, base, scale, True, True, D, SKIP, W, S, HN, BN,
            PRECISION,
        )  # fmt: skip

    tl.store(lse + flat.to(tl.int64) * lse_h + row, (top + tl.log2(total)) * _LN_2, mask=row < rows)
    _store(out + flat * HN, row, tl.num_programs(0) * HN, rows, acc / total[:, None], HN)


@triton.jit
def _query_grad(
    dq, q, grad, lse, delta, k, v, k_s, v_s, lo, hi, position, base, scale, BAND: tl.constexpr, D: tl.constexpr,
    SKIP: tl.constexpr, W: tl.constexpr, S: tl.constexpr, HN: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq, still without the softmax scale, what flows through keys lo to hi."""
    for first in range(lo, hi, BN):
        key = first + tl.arange(0, BN)
        k_tile = _load(k, key, k_s, hi, HN)
        v_tile = _load(v, key, v_s, hi, HN)
        seen = _sees(position[:, None], key[None, :], base, hi, BAND, D, SKIP, W, S)
        score = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        p = tl.where(seen, tl.exp2(score * scale - lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_VARYING)
def dilated_attention_query_grad(
    q, k, v, kept_k, kept_v, out, lse, grad, delta, dq, dk, dv, old_dq,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, kk_s, kk_b, kk_h, kv_s, kv_b, kv_h,
    lse_h, heads, rows, start, length, base, entries, old_from, scale, D: tl.constexpr, SKIP: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GROUP: tl.constexpr, HN: tl.constexpr, PRECISION: tl.constexpr, OLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq and delta of a block of queries of one head and, without a window, dk and dv of their own keys; old_dq as old_out."""
    flat, block = _assignment()
    sequence, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    k += sequence * k_b + head // GROUP * k_h
    v += sequence * v_b + head // GROUP * v_h
    first = block * BM
    row = first + tl.arange(0, BM)
    position = start + row
    log2_scale = scale * _LOG2_E
    stride, offset = tl.num_programs(0) * HN, flat * HN  # of out, grad and all gradients
    stats = flat.to(tl.int64) * lse_h + row

    q_tile = _load(q + sequence * q_b + head * q_h, row, q_s, rows, HN)
    grad_tile = _load(grad + offset, row, stride, rows, HN)
    out_tile = _load(out + offset, row, stride, rows, HN)
    lse_tile = tl.load(lse + stats, mask=row < rows, other=0.0) * _LOG2_E
    delta_tile = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + stats, delta_tile, mask=row < rows)

    if W == 0:
        own_k = _load(k, position - base, k_s, length, HN).to(tl.float32)
        own_v = _load(v, position - base, v_s, length, HN).to(tl.float32)
        p = tl.exp2(tl.sum(q_tile.to(tl.float32) * own_k, 1) * log2_scale - lse_tile)
        ds = p * (tl.sum(grad_tile.to(tl.float32) * own_v, 1) - delta_tile)
        _store(dk + offset, row, stride, rows, (ds * scale)[:, None] * q_tile.to(tl.float32), HN)
        _store(dv + offset, row, stride, rows, p[:, None] * grad_tile.to(tl.float32), HN)
        dq_tile = ds[:, None] * own_k
    else:
        oldest = tl.maximum(start + first - W - base, 0)
        newest = start + tl.minimum(first + BM, rows) - base
        dq_tile = _query_grad(
            tl.zeros([BM, HN], tl.float32), q_tile, grad_tile, lse_tile, delta_tile, k, v, k_s, v_s, oldest, newest, position, base,
            log2_scale, True, D, SKIP, W, S, HN, BN, PRECISION,
        )  # fmt: skip
    if D > 0 or S > 0:
        kk = kept_k + sequence * kk_b + head // GROUP * kk_h
        kv = kept_v + sequence * kv_b + head // GROUP * kv_h
        some = tl.minimum(_entries_before(start + tl.minimum(first + BM, rows) - 1 - W, D, S), entries)
        dq_tile = _query_grad(
            dq_tile, q_tile, grad_tile, lse_tile, delta_tile, kk, kv, kk_s, kv_s, 0, some, position, base,
            log2_scale, False, D, SKIP, W, S, HN, BN, PRECISION,
        )  # fmt: skip
    dq_tile *= scale
    if OLD:
        at = (row - old_from).to(tl.int64)[:, None] * stride + offset + tl.arange(0, HN)[None, :]
        dq_tile += tl.load(old_dq + at, mask=((row >= old_from) & (row < rows))[:, None], other=0.0).to(tl.float32)
    _store(dq + offset, row, stride, rows, dq_tile, HN)


@triton.jit(do_not_specialize=_VARYING)
def dilated_attention_key_grad(
    q, k, v, lse, grad, delta, dk, dv, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, dk_split, dk_shared, dk_s,
    lse_h, heads, rows, start, length, base, entries, count, scale, D: tl.constexpr, SKIP: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, GROUP: tl.constexpr, HN: tl.constexpr, PRECISION: tl.constexpr, BAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of local keys (BAND) or of the kept list, summed over the queries of one split and the heads of a group."""
    groups = heads // GROUP
    sequence, shared = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    first = tl.program_id(1) * BN
    key = first + tl.arange(0, BN)
    k_tile = _load(k + sequence * k_b + shared * k_h, key, k_s, count, HN)
    v_tile = _load(v + sequence * v_b + shared * v_h, key, v_s, count, HN)
    log2_scale = scale * _LOG2_E

    blocks = tl.cdiv(rows, BM)
    each = tl.cdiv(blocks, tl.num_programs(2))
    if BAND:
        lo = tl.maximum(base + first - start, 0) // BM
        hi = tl.cdiv(tl.maximum(tl.minimum(base + tl.minimum(first + BN, count) + W - start, rows), 0), BM)
    else:
        lo = tl.maximum(tl.maximum(_position_of(first, D, S) + W + 1 - start, 0) // BM, tl.program_id(2) * each)
        hi = tl.minimum((tl.program_id(2) + 1) * each, blocks)
    width = tl.maximum(hi - lo, 0)

    dk_tile = tl.zeros([BN, HN], tl.float32)
    dv_tile = tl.zeros([BN, HN], tl.float32)
    for step in range(width * GROUP):  # one loop over heads and blocks keeps the load pipeline full
        head = shared * GROUP + step // width
        row = (lo + step % width) * BM + tl.arange(0, BM)
        flat = tl.program_id(0) * GROUP + step // width
        q_tile = _load(q + sequence * q_b + head * q_h, row, q_s, rows, HN)
        grad_tile = _load(grad + flat * HN, row, tl.num_programs(0) * GROUP * HN, rows, HN)
        stats = flat.to(tl.int64) * lse_h + row
        lse_tile = tl.load(lse + stats, mask=row < rows, other=0.0) * _LOG2_E
        delta_tile = tl.load(delta + stats, mask=row < rows, other=0.0)
        seen = _sees((start + row)[None, :], key[:, None], base, count, BAND, D, SKIP, W, S) & (row < rows)[None, :]
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        p = tl.where(seen, tl.exp2(score * log2_scale - lse_tile[None, :]), 0.0)
        dv_tile = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        ds = p * (dp - delta_tile[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    offset = tl.program_id(2).to(tl.int64) * dk_split + tl.program_id(0).to(tl.int64) * dk_shared
    _store(dk + offset, key, dk_s, count, dk_tile * scale, HN)
    _store(dv + offset, key, dk_s, count, dv_tile, HN)


@triton.jit(do_not_specialize=_VARYING)
def dilated_attention_add(
    sums_k, sums_v, dk, dv, dkept_k, dkept_v, sum_split, sum_shared, sum_s, splits, entries, base, kept_before,
    D: tl.constexpr, S: tl.constexpr, HN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds sums over the kept list to its own gradients, or to those of the local keys that its later entries are."""
    entry = tl.program_id(1) * BN + tl.arange(0, BN)
    total_k = tl.zeros([BN, HN], tl.float32)
    total_v = tl.zeros([BN, HN], tl.float32)
    offset = tl.program_id(0).to(tl.int64) * sum_shared
    for _ in range(splits):
        total_k += _load(sums_k + offset, entry, sum_s, entries, HN).to(tl.float32)
        total_v += _load(sums_v + offset, entry, sum_s, entries, HN).to(tl.float32)
        offset += sum_split

    stride = tl.num_programs(0) * HN
    before = (entry < kept_before) & (entry < entries)
    inside = (entry >= kept_before) & (entry < entries)
    column = tl.program_id(0) * HN + tl.arange(0, HN)[None, :]
    listed = entry.to(tl.int64)[:, None] * stride + column
    local = (_position_of(entry, D, S) - base).to(tl.int64)[:, None] * stride + column
    tl.store(dkept_k + listed, total_k.to(dkept_k.dtype.element_ty), mask=before[:, None])
    tl.store(dkept_v + listed, total_v.to(dkept_v.dtype.element_ty), mask=before[:, None])
    total_k += tl.load(dk + local, mask=inside[:, None], other=0.0).to(tl.float32)
    total_v += tl.load(dv + local, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dk + local, total_k.to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + local, total_v.to(dv.dtype.element_ty), mask=inside[:, None])
