"""One long sequence on several ranks: the recurrence hands on a boundary state, sparse attention gathers only the keys it keeps.

Of c ranks, rank r holds the zig-zag chunks r and 2c-1-r of the sequence (Megatron's order, which evens out causal attention). All
tensors are [s, b, heads, hn] with the rank's two chunks one after the other in s.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from rat_megatron.ops.dilated_attention import dilated_attention, segment_attention
from rat_megatron.ops.gated_scan import adjoint_summary, gated_scan, scan_summary
from rat_megatron.pattern import HeadPattern, LayerPattern


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of the sequence, of 2 * size, that a rank holds."""
    return rank, 2 * size - 1 - rank


def in_sequence_order(gathered: Tensor, size: int) -> Tensor:
    """Chunks gathered along dimension 0, rank by rank, brought into the order of the sequence: [2c * n, ...] -> [2c * n, ...]."""
    order = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    chunks = gathered.chunk(2 * size)
    return torch.cat([chunks[order.index(chunk)] for chunk in range(2 * size)])


# ---- the recurrence ------------------------------------------------------------------------------------------------------------------


def gated_scan_context_parallel(f: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """gated_scan over the whole sequence, of which this rank holds two chunks: f, k, v [s, b, ng, hn] -> k~, v~ [s, b, ng, hn].

    What a chunk does to the state is h_out = A * h_in + B. The ranks exchange (A, B) in fp32, [2, 3, b, ng, hn] each, and every chunk
    runs from its true state; the backward pass exchanges the same the other way round. Nothing is computed in logarithms.
    """
    return _ContextParallelScan.apply(f, k, v, group)


class _ContextParallelScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, k, v, group):
        rank, size = group.rank(), group.size()
        chunks = [[x.detach().requires_grad_() for x in inputs] for inputs in zip(f.chunk(2), k.chunk(2), v.chunk(2), strict=True)]
        summaries = in_sequence_order(_all_gather(torch.stack([scan_summary(*inputs) for inputs in chunks]), group), size)
        decays, states, state = summaries[:, :1], [], torch.zeros_like(summaries[0, 1:])
        for decay, ends in zip(decays, summaries[:, 1:], strict=True):  # [1, b, ng, hn], [2, b, ng, hn]
            states.append(state)
            state = decay * state + ends
        # The local graph is kept: its backward is run with the adjoint that comes from the later chunks.
        with torch.enable_grad():
            ctx.local = [(inputs, gated_scan(*inputs, states[at])) for inputs, at in zip(chunks, chunks_of(rank, size), strict=True)]
        ctx.decays, ctx.group = decays, group
        (_, first), (_, second) = ctx.local
        return torch.cat([first[0].detach(), second[0].detach()]), torch.cat([first[1].detach(), second[1].detach()])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k, grad_v):
        rank, size = ctx.group.rank(), ctx.group.size()
        incoming = list(zip(grad_k.chunk(2), grad_v.chunk(2), strict=True))
        own = torch.stack([adjoint_summary(inputs[0], *grads) for (inputs, _), grads in zip(ctx.local, incoming, strict=True)])
        starts = in_sequence_order(_all_gather(own, ctx.group), size)
        adjoint, adjoints = torch.zeros_like(starts[0]), []
        for decay, start in zip(reversed(ctx.decays), reversed(starts), strict=True):
            adjoints.append(adjoint)  # of the state after this chunk
            adjoint = decay * adjoint + start
        adjoints.reverse()
        grads = []
        for (inputs, outputs), (chunk_grad_k, chunk_grad_v), at in zip(ctx.local, incoming, chunks_of(rank, size), strict=True):
            grads.append(torch.autograd.grad(outputs, inputs, (chunk_grad_k, chunk_grad_v, adjoints[at])))
        del ctx.local
        return *(torch.cat(pair) for pair in zip(*grads, strict=True)), None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every rank along dimension 0: [n, ...] -> [c * n, ...]."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


# ---- attention -----------------------------------------------------------------------------------------------------------------------


def attention_context_parallel(
    q: Tensor, k: Tensor, v: Tensor, pattern: LayerPattern, softmax_scale: float, group: dist.ProcessGroup
) -> Tensor:
    """dilated_attention over the whole sequence for this rank's queries: q [s, b, np, hn], k, v [s, b, ng, hn] -> [s, b, np, hn].

    A dilated pattern gathers the kept keys and the sinks and receives a window's worth of keys before each chunk; dense and top-k ones
    gather every key. A chunk must be a multiple of the dilation.
    """
    heads, groups = q.shape[2], k.shape[2]
    if pattern.is_uniform:
        return _attend(q, k, v, pattern.heads[0], softmax_scale, group)
    outputs = torch.empty_like(q)
    for head in dict.fromkeys(pattern.heads):
        members = [h for h in range(heads) if pattern.heads[h] == head]
        shared = [h // (heads // groups) for h in members]
        outputs[:, :, members] = _attend(q[:, :, members], k[:, :, shared], v[:, :, shared], head, softmax_scale, group)
    return outputs


def _attend(q: Tensor, k: Tensor, v: Tensor, head: HeadPattern, softmax_scale: float, group: dist.ProcessGroup) -> Tensor:
    rank, size, length = group.rank(), group.size(), q.shape[0] // 2
    kv = torch.cat([k, v], dim=2)  # [s, b, 2 ng, hn]: one message for both
    if head.is_dense or head.blocks or max(head.window, head.sinks) > length:
        keys, values = in_sequence_order(gather_from_sequence_parallel_region(kv, group=group), size).chunk(2, dim=2)
        at = torch.cat([torch.arange(length, device=q.device) + chunk * length for chunk in chunks_of(rank, size)])
        every = torch.arange(keys.shape[0], device=q.device)
        return dilated_attention(q, keys, values, LayerPattern((head,)), softmax_scale, at, every)

    kept, kept_at = _gather_kept(kv, head, group)
    halos = _Halo.apply(kv, head.window, group) if head.window else [kv[:0], kv[:0]]
    outputs = []
    for slot, (chunk, q_chunk, kv_chunk) in enumerate(zip(chunks_of(rank, size), q.chunk(2), kv.chunk(2), strict=True)):
        local = torch.cat([halos[slot], kv_chunk]) if chunk else kv_chunk  # before the first chunk there is nothing
        keys, values = local.chunk(2, dim=2)
        kept_keys, kept_values = kept.chunk(2, dim=2)
        outputs.append(segment_attention(q_chunk, keys, values, kept_keys, kept_values, kept_at, head, softmax_scale, chunk * length))
    return torch.cat(outputs)


def _gather_kept(kv: Tensor, head: HeadPattern, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The dilated and sink keys of the whole sequence and their positions, in order: [n, b, 2 ng, hn] and [n]."""
    size, length = group.size(), kv.shape[0] // 2
    parts, positions = [kv[:0]], [torch.arange(0)]
    if head.dilation is not None:
        if length % head.dilation:
            raise ValueError(f"a context-parallel chunk of {length} tokens is not a multiple of the dilation of '{head}'")
        own = kv[head.dilation - 1 :: head.dilation]  # a chunk is whole dilation steps, so this also holds across the two chunks
        parts.append(in_sequence_order(gather_from_sequence_parallel_region(own.contiguous(), group=group), size))
        positions.append(torch.arange(head.dilation - 1, 2 * size * length, head.dilation))
    sinks = torch.tensor([p for p in range(head.sinks) if head.dilation is None or (p + 1) % head.dilation], dtype=torch.long)
    if len(sinks):
        parts.append(_FromFirstRank.apply(kv[sinks.to(kv.device)], group))
        positions.append(sinks)
    order = torch.argsort(torch.cat(positions))
    return torch.cat(parts)[order.to(kv.device)], torch.cat(positions)[order]


class _FromFirstRank(torch.autograd.Function):
    """The first rank's tensor on every rank; backward sums the gradients there."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.broadcast(x, group_src=0, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.reduce(grad, group_dst=0, group=ctx.group)
        return grad if ctx.group.rank() == 0 else torch.zeros_like(grad), None


class _Halo(torch.autograd.Function):
    """The ``window`` tokens before each of this rank's chunks: x [s, ...] -> [2, window, ...]; zeros before the first chunk.

    Neighbours in the sequence are neighbours in the group, so each rank talks to two others at most.
    """

    @staticmethod
    def forward(ctx, x, window, group):
        ctx.window, ctx.group, ctx.shape = window, group, x.shape
        first, second = x.chunk(2)
        return torch.stack(_shift(first[-window:], second[-window:], group))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        before_first, before_second = grad
        grad_x = grad.new_zeros(ctx.shape)
        first, second = grad_x.chunk(2)
        tail_first, tail_second = _shift(before_first, before_second, ctx.group, backward=True)
        first[-ctx.window :] += tail_first
        second[-ctx.window :] += tail_second
        return grad_x, None, None


def _shift(first: Tensor, second: Tensor, group: dist.ProcessGroup, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Hands what belongs to each chunk to the owner of the chunk after it (before it, backward); zeros where there is none.

    The first chunks ascend with the ranks and the second ones descend, so forward each rank sends its first up and its second down. On
    the last rank the two chunks follow each other.
    """
    rank, size = group.rank(), group.size()
    up, down = (second, first) if backward else (first, second)
    to_up, to_down = rank + 1 < size, rank > 0
    n = first.shape[0]
    sent = torch.cat([x for x, there in ((down, to_down), (up, to_up)) if there] or [up[:0]])
    splits = [0] * size
    if to_down:
        splits[rank - 1] = n
    if to_up:
        splits[rank + 1] = n
    received = sent.new_empty(sum(splits), *first.shape[1:])
    dist.all_to_all_single(received, sent.contiguous(), splits, splits, group=group)
    from_down = received[:n] if to_down else torch.zeros_like(first)
    from_up = received[-n:] if to_up else up  # on the last rank, its own other chunk
    return (from_up, from_down) if backward else (from_down, from_up)
