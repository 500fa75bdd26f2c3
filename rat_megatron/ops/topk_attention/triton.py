"""Top-k block attention in Triton, forward and backward: each tile of queries reads only the key blocks that one of its queries chose.

The choice of blocks is that of ops/topk_attention.py. It is kept as one byte per query and block, and nothing is built per query and
key. Sources: the top-k hybrid of RAT+ (arXiv 2602.18196); scores as in Quest (arXiv 2406.10774).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rat_megatron.ops.topk_attention import _choose_blocks, _scores
from rat_megatron.ratplus.pattern import HeadPattern

_LOG2_E = 1.4426950408889634
_TILE = 64  # queries of a tile: larger tiles choose more blocks between them
_FUSED_BLOCKS = 512  # as many blocks as one program can hold the scores of; beyond, torch chooses
_SCORES = 2**26  # scores that torch then has in memory at a time


def topk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head: HeadPattern,
    softmax_scale: float,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ops.topk_attention.topk_attention: q [b, np, sq, hn], k and v [b, ng, sk, hn]; returns [b, np, sq, hn] laid out like q.

    bf16, fp16 or fp32, unit stride in hn, hn a power of two from 16 on. Positions are int64 [sq] and [sk] in any order and 0, 1, ...
    when absent, which spares a copy of the keys. Differentiable once in q, k and v; the choice of blocks has no gradient. Results do
    not change between runs. Raises ValueError when shapes do not fit.
    """
    head_dim = q.shape[3]
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[3] != head_dim:
        raise ValueError(f"queries {list(q.shape)} cannot attend to keys {list(k.shape)} and values {list(v.shape)}")
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"the top-k kernel needs a head dimension that is a power of two from 16 on, not {head_dim}")
    if k_positions is not None:
        order = k_positions.argsort()
        k, v = k[:, :, order], v[:, :, order]
    if q_positions is None:
        q_positions = torch.arange(q.shape[2], device=q.device)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    with torch.no_grad():
        chosen = _chosen_blocks(q, k, head, q_positions)
    return _TopkAttention.apply(q, k, v, chosen, q_positions.to(torch.int32), head, softmax_scale)


def _chosen_blocks(q: torch.Tensor, k: torch.Tensor, head: HeadPattern, q_positions: torch.Tensor) -> torch.Tensor:
    """1 where a query chose a block: int8 [b, np, blocks, sq], blocks before queries so that a tile of queries is one short read."""
    upper, lower = _block_bounds(k, head.dilation)
    blocks, queries = upper.shape[2], q.shape[2]
    chosen = torch.empty(*q.shape[:2], blocks, queries, dtype=torch.int8, device=q.device)
    if blocks <= _FUSED_BLOCKS:
        rows = 32
        _topk_choice[(triton.cdiv(queries, rows), q.shape[0] * q.shape[1])](
            q, upper, lower, chosen, q_positions, *_strides(q), q.shape[1], queries, blocks,
            SHARED=q.shape[1] // k.shape[1], SIZE=head.dilation, COUNT=head.blocks, HEAD_DIM=q.shape[3], ROWS=rows,
            BLOCKS=max(16, triton.next_power_of_2(blocks)), CHANNELS=min(32, q.shape[3]), num_warps=4, num_stages=1,
        )  # fmt: skip
        return chosen
    upper, lower = upper.float(), lower.float()
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * blocks))
    for start in range(0, queries, step):
        part = slice(start, start + step)
        scores = _scores(q[:, :, part], upper, lower)
        chosen[..., part] = _choose_blocks(scores, q_positions[part] // head.dilation, head.blocks).mT
    return chosen


def _block_bounds(k: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elementwise maximum and minimum of the keys of every block. k [b, ng, sk, hn], in order -> contiguous [b, ng, blocks, hn].

    A block that is not complete gets zeros: the queries that can see it have it as their own.
    """
    complete, length = k.shape[2] // size, k.shape[2]
    lower, upper = k[:, :, : complete * size].unflatten(2, (complete, size)).aminmax(dim=3)
    return tuple(F.pad(x, (0, 0, 0, -(-length // size) - complete)).contiguous() for x in (upper, lower))


def _active_blocks(chosen: torch.Tensor, head: HeadPattern, positions: torch.Tensor) -> torch.Tensor:
    """Which blocks a tile of queries reads: bool [b, np, blocks, tiles]. With the rest dilated, all up to that of its last query."""
    missing = -chosen.shape[3] % _TILE
    active = F.pad(chosen, (0, missing)).unflatten(3, (-1, _TILE)).amax(dim=4) > 0
    if head.dilate_rest:
        last = F.pad(positions, (0, missing), value=-1).unflatten(0, (-1, _TILE)).amax(dim=1)
        active = active | (torch.arange(chosen.shape[2], device=chosen.device)[:, None] <= last // head.dilation)
    return active


def _lists(active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of the true entries along the last dimension, in order and first, and how many they are; int32."""
    order = active.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return order.to(torch.int32).contiguous(), active.sum(dim=-1, dtype=torch.int32)


class _TopkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, chosen, positions, head, softmax_scale):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        active = _active_blocks(chosen, head, positions)
        block, count = _lists(active.mT)
        _topk_forward[(block.shape[2], q.shape[0] * q.shape[1])](
            q, k, v, out, lse, chosen, positions, block, count, *_strides(q, k, v, out),
            softmax_scale * _LOG2_E, *_sizes(q, k, chosen), **_constants(q, k, head, 3),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, chosen, positions, active, block, count)
        ctx.head, ctx.softmax_scale = head, softmax_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, out, lse, chosen, positions, active, block, count = ctx.saved_tensors
        if grad_out.stride(3) != 1:
            grad_out = grad_out.contiguous()
        grad_q, grad_k, grad_v, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        scales, constants = (ctx.softmax_scale, ctx.softmax_scale * _LOG2_E), _constants(q, k, ctx.head, 2)
        _topk_query_grad[(block.shape[2], q.shape[0] * q.shape[1])](
            q, k, v, out, grad_out, lse, delta, grad_q, chosen, positions, block, count, *_strides(q, k, v, out, grad_out, grad_q),
            *scales, *_sizes(q, k, chosen), **constants,
        )  # fmt: skip
        tile, count = _lists(active)
        parts = triton.cdiv(ctx.head.dilation, constants["KEYS"])
        _topk_key_grad[(chosen.shape[2] * parts, k.shape[0] * k.shape[1])](
            q, k, v, grad_out, lse, delta, grad_k, grad_v, chosen, positions, tile, count,
            *_strides(q, k, v, grad_out, grad_k, grad_v), *scales, *_sizes(q, k, chosen), tile.shape[3], **constants,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None, None


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in range(3)]


def _sizes(q: torch.Tensor, k: torch.Tensor, chosen: torch.Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], q.shape[2], k.shape[2], chosen.shape[2]


def _constants(q: torch.Tensor, k: torch.Tensor, head: HeadPattern, stages: int) -> dict[str, int | bool]:
    """Blocks larger than 64 keys are read in parts of 64; smaller ones in one part, padded to a power of two that a dot takes."""
    return {
        "SHARED": q.shape[1] // k.shape[1],
        "SIZE": head.dilation,
        "KEYS": min(64, max(16, triton.next_power_of_2(head.dilation))),
        "REST": head.dilate_rest,
        "TILE": _TILE,
        "HEAD_DIM": q.shape[3],
        "num_warps": 4,
        "num_stages": stages if q.shape[3] * q.element_size() <= 256 else 1,  # what fits into shared memory
    }


@triton.jit
def _topk_choice(
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
def _topk_forward(
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
def _topk_query_grad(
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
def _topk_key_grad(
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
