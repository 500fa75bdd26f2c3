"""Triton kernels of top-k block attention: the choice of blocks, forward, gradients of the queries, gradients of the keys.

Sources: the top-k hybrid of RAT+ (arXiv 2602.18196); scores as in Quest (arXiv 2406.10774).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def topk_choice(
    q, upper, lower, chosen, positions, q_b, q_h, q_s, heads, queries, blocks,
    SHARED: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The blocks that ROWS queries of one head choose, from the scores of all blocks at once."""
    b, h = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    row, block, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCKS), tl.arange(0, CHANNELS)
    real, stored = row < queries, block < blocks
    q_at = q + b * q_b + h * q_h + row[:, None].to(tl.int64) * q_s + d[None, :]
    bound_at = (b * (heads // SHARED) + h // SHARED) * blocks * HEAD_DIM + block[None, :] * HEAD_DIM + d[:, None]
    scores = tl.zeros([ROWS, BLOCKS], tl.float32)
    if COUNT > 2:
        for start in range(0, HEAD_DIM, CHANNELS):
            part = tl.load(q_at + start, mask=real[:, None], other=0.0)
            highest = tl.load(upper + bound_at + start, mask=stored[None, :], other=0.0)
            lowest = tl.load(lower + bound_at + start, mask=stored[None, :], other=0.0)
            nothing = tl.zeros_like(part)  # the sign of a query's channel says which bound wins
            scores += tl.dot(tl.where(part > 0, part, nothing), highest, input_precision="ieee")
            scores += tl.dot(tl.where(part < 0, part, nothing), lowest, input_precision="ieee")

    own = (tl.load(positions + row, mask=real, other=0) // SIZE).to(tl.int32)[:, None]
    candidate = (block[None, :] > 0) & (block[None, :] < own)
    scores = tl.where(candidate, scores, float("-inf"))
    for _ in range(COUNT - 2):
        best = tl.argmax(scores, axis=1)
        scores = tl.where(block[None, :] == best[:, None], float("-inf"), scores)
    wanted = (block[None, :] == own) | (candidate & (scores == float("-inf")))
    if COUNT > 1:
        wanted = wanted | (block[None, :] == 0)
    chosen_at = chosen + ((b * heads + h) * blocks + block[None, :]) * queries + row[:, None]
    tl.store(chosen_at, wanted.to(tl.int8), mask=real[:, None] & stored[None, :])


@triton.jit
def topk_forward(
    q, k, v, out, lse, chosen, positions, block_list, block_count,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, log2_scale, heads, queries, keys, blocks,
    SHARED: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (base 2) of one tile of queries of one head."""
    tile, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    row, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    real, place = row < queries, row[:, None].to(tl.int64)
    at = tl.load(positions + row, mask=real, other=2147483647)
    first_at = tl.min(at, axis=0)
    q_tile = tl.load(q + b * q_b + h * q_h + place * q_s + d[None, :], mask=real[:, None], other=0.0)
    k_at, v_at = k + b * k_b + h // SHARED * k_h, v + b * v_b + h // SHARED * v_h
    chosen_at = chosen + (b * heads + h) * blocks * queries + row
    tile_at = (b * heads + h) * tl.num_programs(0) + tile
    PARTS: tl.constexpr = (SIZE + KEYS - 1) // KEYS

    top = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for i in range(tl.load(block_count + tile_at) * PARTS):
        block = tl.load(block_list + tile_at * blocks + i // PARTS)
        inside = i % PARTS * KEYS + tl.arange(0, KEYS)
        key = block * SIZE + inside
        stored = (inside < SIZE) & (key < keys)
        k_tile = tl.load(k_at + key[:, None].to(tl.int64) * k_s + d[None, :], mask=stored[:, None], other=0.0)
        v_tile = tl.load(v_at + key[:, None].to(tl.int64) * v_s + d[None, :], mask=stored[:, None], other=0.0)
        choice = tl.load(chosen_at + block.to(tl.int64) * queries, mask=real, other=0)
        chose = (choice > 0) | REST
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale
        if _is_edge(block * SIZE + i % PARTS * KEYS, first_at, SIZE, KEYS, REST):
            seen = _seen(choice[:, None], at[:, None], inside[None, :], key[None, :], stored[None, :], SIZE, REST)
            scores = tl.where(seen, scores, -1e30)
        new_top = tl.where(chose, tl.maximum(top, tl.max(scores, axis=1)), top)
        shrink = tl.exp2(top - new_top)
        # A bound of +1e30 gives a row that did not choose the block weights of 0 with no mask over its scores. One of at least -1e29
        # does so for hidden keys of a row that has seen none yet.
        weight = tl.exp2(scores - tl.where(chose, tl.maximum(new_top, -1e29), 1e30)[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")
        top = new_top
    total = tl.where(real, total, 1.0)
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + b * o_b + h * o_h + place * o_s + d[None, :], result, mask=real[:, None])
    tl.store(lse + (b * heads + h) * queries + row, top + tl.log2(total), mask=real)


@triton.jit
def topk_query_grad(
    q, k, v, out, grad_out, lse, delta, grad_q, chosen, positions, block_list, block_count,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    scale, log2_scale, heads, queries, keys, blocks,
    SHARED: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one head, and its delta = sum(grad_out * out) for the next kernel."""
    tile, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    row, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    real, place = row < queries, row[:, None].to(tl.int64)
    at = tl.load(positions + row, mask=real, other=2147483647)
    first_at = tl.min(at, axis=0)
    q_tile = tl.load(q + b * q_b + h * q_h + place * q_s + d[None, :], mask=real[:, None], other=0.0)
    do_tile = tl.load(grad_out + b * do_b + h * do_h + place * do_s + d[None, :], mask=real[:, None], other=0.0)
    o_tile = tl.load(out + b * o_b + h * o_h + place * o_s + d[None, :], mask=real[:, None], other=0.0)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), axis=1)
    tl.store(delta + (b * heads + h) * queries + row, row_delta, mask=real)
    row_lse = tl.load(lse + (b * heads + h) * queries + row, mask=real, other=0.0)
    k_at, v_at = k + b * k_b + h // SHARED * k_h, v + b * v_b + h // SHARED * v_h
    chosen_at = chosen + (b * heads + h) * blocks * queries + row
    tile_at = (b * heads + h) * tl.num_programs(0) + tile
    PARTS: tl.constexpr = (SIZE + KEYS - 1) // KEYS

    total = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for i in range(tl.load(block_count + tile_at) * PARTS):
        block = tl.load(block_list + tile_at * blocks + i // PARTS)
        inside = i % PARTS * KEYS + tl.arange(0, KEYS)
        key = block * SIZE + inside
        stored = (inside < SIZE) & (key < keys)
        k_tile = tl.load(k_at + key[:, None].to(tl.int64) * k_s + d[None, :], mask=stored[:, None], other=0.0)
        v_tile = tl.load(v_at + key[:, None].to(tl.int64) * v_s + d[None, :], mask=stored[:, None], other=0.0)
        choice = tl.load(chosen_at + block.to(tl.int64) * queries, mask=real, other=0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale
        if _is_edge(block * SIZE + i % PARTS * KEYS, first_at, SIZE, KEYS, REST):
            seen = _seen(choice[:, None], at[:, None], inside[None, :], key[None, :], stored[None, :], SIZE, REST)
            scores = tl.where(seen, scores, -1e30)
        weight = tl.exp2(scores - tl.where((choice > 0) | REST, row_lse, 1e30)[:, None])
        change = weight * (tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee") - row_delta[:, None])
        total += tl.dot(change.to(k_tile.dtype), k_tile, input_precision="ieee")
    result = (total * scale).to(grad_q.dtype.element_ty)
    tl.store(grad_q + b * dq_b + h * dq_h + place * dq_s + d[None, :], result, mask=real[:, None])


@triton.jit
def topk_key_grad(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, chosen, positions, tile_list, tile_count,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    scale, log2_scale, heads, queries, keys, blocks, tiles,
    SHARED: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values (or a part of it), from all the tiles of queries of all its heads, in order."""
    PARTS: tl.constexpr = (SIZE + KEYS - 1) // KEYS
    groups = heads // SHARED
    block, b, group = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64) // groups, tl.program_id(1).to(tl.int64) % groups
    inside, d = tl.program_id(0) % PARTS * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    key = block * SIZE + inside
    stored, place = (inside < SIZE) & (key < keys), key[:, None].to(tl.int64)
    k_tile = tl.load(k + b * k_b + group * k_h + place * k_s + d[None, :], mask=stored[:, None], other=0.0)
    v_tile = tl.load(v + b * v_b + group * v_h + place * v_s + d[None, :], mask=stored[:, None], other=0.0)

    total_k = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    total_v = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    for h in range(group * SHARED, group * SHARED + SHARED):
        block_at = (b * heads + h) * blocks + block
        for i in range(tl.load(tile_count + block_at)):
            row = tl.load(tile_list + block_at * tiles + i) * TILE + tl.arange(0, TILE)
            real, query = row < queries, row[:, None].to(tl.int64)
            at = tl.load(positions + row, mask=real, other=2147483647)
            choice = tl.load(chosen + block_at * queries + row, mask=real, other=0)
            q_tile = tl.load(q + b * q_b + h * q_h + query * q_s + d[None, :], mask=real[:, None], other=0.0)
            do_tile = tl.load(grad_out + b * do_b + h * do_h + query * do_s + d[None, :], mask=real[:, None], other=0.0)
            row_lse = tl.load(lse + (b * heads + h) * queries + row, mask=real, other=0.0)
            row_delta = tl.load(delta + (b * heads + h) * queries + row, mask=real, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * log2_scale
            if _is_edge(block * SIZE + tl.program_id(0) % PARTS * KEYS, tl.min(at, axis=0), SIZE, KEYS, REST):
                seen = _seen(choice[None, :], at[None, :], inside[:, None], key[:, None], stored[:, None], SIZE, REST)
                scores = tl.where(seen, scores, -1e30)
            weight = tl.exp2(scores - tl.where((choice > 0) | REST, row_lse, 1e30)[None, :])
            total_v += tl.dot(weight.to(do_tile.dtype), do_tile, input_precision="ieee")
            change = weight * (tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee") - row_delta[None, :])
            total_k += tl.dot(change.to(q_tile.dtype), q_tile, input_precision="ieee")
    result = (total_k * scale).to(grad_k.dtype.element_ty)
    tl.store(grad_k + b * dk_b + group * dk_h + place * dk_s + d[None, :], result, mask=stored[:, None])
    result = total_v.to(grad_v.dtype.element_ty)
    tl.store(grad_v + b * dv_b + group * dv_h + place * dv_s + d[None, :], result, mask=stored[:, None])


@triton.jit
def _is_edge(start, first_at, SIZE: tl.constexpr, KEYS: tl.constexpr, REST: tl.constexpr):
    """Whether keys from start on need a mask of their own: some do not exist, or come after some query, or are seen apart from others."""
    return (start + KEYS - 1 > first_at) | (SIZE % KEYS != 0) | REST


@triton.jit
def _seen(choice, at, inside, key, stored, SIZE: tl.constexpr, REST: tl.constexpr):
    """Which queries see which keys of a block, for arguments that broadcast. With REST also a block's last key, the dilated one."""
    seen = choice > 0
    if REST:
        seen = seen | (inside == SIZE - 1)
    return seen & (key <= at) & stored
