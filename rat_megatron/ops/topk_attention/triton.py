"""Top-k block attention in Triton, forward and backward: each tile of queries reads only the key blocks that one of its queries chose.

The choice of blocks is kept as one byte per query and block, and nothing is built per query and key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch.autograd.function import once_differentiable

from rat_megatron.ops.dispatch import HEAD_DIMS, fill_tiles
from rat_megatron.ops.topk_attention.kernels import topk_choice, topk_forward, topk_key_grad, topk_query_grad
from rat_megatron.ratplus.attention_ratplus import choose_blocks
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
    """bf16, fp16 or fp32, hn a multiple of 16 up to 256. Absent positions spare a copy of the keys. Returns [b, np, sq, hn] laid out
    like q; results do not change between runs. Raises ValueError for other head dimensions.
    """
    head_dim = q.shape[3]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the top-k kernel needs a head dimension that is a multiple of 16 up to 256, not {head_dim}")
    q, k, v = fill_tiles(q, k, v)
    if k_positions is not None:
        order = k_positions.argsort()
        k, v = k[:, :, order], v[:, :, order]
    if q_positions is None:
        q_positions = torch.arange(q.shape[2], device=q.device)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    with torch.no_grad():
        chosen = _chosen_blocks(q, k, head, q_positions)
    return _TopkAttention.apply(q, k, v, chosen, q_positions.to(torch.int32), head, softmax_scale)[..., :head_dim]


def _chosen_blocks(q: torch.Tensor, k: torch.Tensor, head: HeadPattern, q_positions: torch.Tensor) -> torch.Tensor:
    """1 where a query chose a block: int8 [b, np, blocks, sq], blocks before queries so that a tile of queries is one short read."""
    upper, lower = _block_bounds(k, head.dilation)
    blocks, queries = upper.shape[2], q.shape[2]
    chosen = torch.empty(*q.shape[:2], blocks, queries, dtype=torch.int8, device=q.device)
    if blocks <= _FUSED_BLOCKS:
        rows = 32
        topk_choice[(triton.cdiv(queries, rows), q.shape[0] * q.shape[1])](
            q, upper, lower, chosen, q_positions, *_strides(q), q.shape[1], queries, blocks,
            SHARED=q.shape[1] // k.shape[1], SIZE=head.dilation, COUNT=head.blocks, HEAD_DIM=q.shape[3], ROWS=rows,
            BLOCKS=max(16, triton.next_power_of_2(blocks)), CHANNELS=min(32, q.shape[3]), num_warps=4, num_stages=1,
        )  # fmt: skip
        return chosen
    bounds = F.pad(torch.stack([upper, lower]), (0, 0, 0, 1))  # choose_blocks() has one block more, for padding
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * blocks))
    for start in range(0, queries, step):
        part = slice(start, start + step)
        chosen[..., part] = choose_blocks(q[:, :, part], bounds, q_positions[None, part], head, "bounds")[..., :-1].mT
    return chosen


def _block_bounds(k: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elementwise maximum and minimum of the keys of every block. k [b, ng, sk, hn], in order -> contiguous [b, ng, blocks, hn].

    A block that is not complete gets zeros: the queries that can see it have it as their own.
    """
    complete, length = k.shape[2] // size, k.shape[2]
    lower, upper = k[:, :, : complete * size].unflatten(2, (complete, size)).aminmax(dim=3)
    upper, lower = (F.pad(x, (0, 0, 0, -(-length // size) - complete)).contiguous() for x in (upper, lower))
    return upper, lower


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
        topk_forward[(block.shape[2], q.shape[0] * q.shape[1])](
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
        topk_query_grad[(block.shape[2], q.shape[0] * q.shape[1])](
            q, k, v, out, grad_out, lse, delta, grad_q, chosen, positions, block, count, *_strides(q, k, v, out, grad_out, grad_q),
            *scales, *_sizes(q, k, chosen), **constants,
        )  # fmt: skip
        tile, count = _lists(active)
        parts = triton.cdiv(ctx.head.dilation, constants["KEYS"])
        topk_key_grad[(chosen.shape[2] * parts, k.shape[0] * k.shape[1])](
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
