"""One long sequence on several ranks: the recurrence hands on a boundary state, sparse attention gathers only the keys it keeps.

Of c ranks, rank r holds the zig-zag chunks r and 2c-1-r of the sequence (Megatron's order, which evens out causal attention). All
tensors are [s, b, heads, hn] with the rank's two chunks one after the other in s.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from rat_megatron.ops.dilated_attention import dilated_attention, kept_positions, segment_attention
from rat_megatron.ops.dilated_attention.heads import attend_by_head
from rat_megatron.ops.dilated_attention.reference import causal_attention
from rat_megatron.ops.gated_scan import (
    adjoint_summary,
    mixed_qkv_widths,
    scan_backward,
    scan_forward,
    scan_summary,
    states_of_chunks,
)
from rat_megatron.ratplus.pattern import HeadPattern, LayerPattern


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of the sequence, of 2 * size, that a rank holds."""
    return rank, 2 * size - 1 - rank


def in_sequence_order(gathered: Tensor, size: int) -> list[Tensor]:
    """The chunks [n, ...], in the order of the sequence, of what was gathered along dimension 0 rank by rank, [2c * n, ...]."""
    order = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    chunks = gathered.split(len(gathered) // (2 * size))
    return [chunks[order.index(chunk)] for chunk in range(2 * size)]


# ---- the recurrence ------------------------------------------------------------------------------------------------------------------


def scan_mixed_qkv_context_parallel(
    projection: Tensor, query_width: int, group: dist.ProcessGroup, output_gate: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scan_mixed_qkv over the whole sequence, of which this rank holds two chunks, without RoPE.

    projection: [s, b, ng, 2 * query_width + 3 * hn] -> query and output gate [s, b, ng, query_width], k~ and v~ [s, b, ng, hn]. What a
    chunk does to the state is h_out = A * h_in + B. The ranks exchange (A, B) in fp32, [2, 3, b, ng, hn] each, and every chunk runs from
    its true state; the backward pass exchanges the same the other way round. Nothing is computed in logarithms.
    """
    training = torch.is_grad_enabled() and projection.requires_grad
    return _ScanMixedQkv.apply(projection, mixed_qkv_widths(projection, query_width, output_gate), group, training)


class _ScanMixedQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projection, widths, group, training):
        query, gate, *_ = projection.split(widths, dim=-1)
        _, _, k, v, f = _side_by_side(projection).split(widths, dim=-1)
        summaries = _all_gather(scan_summary(f, k, v), group)  # [c, 3, 2, b * ng, hn]
        decays, ends = summaries[:, 0], summaries[:, 1:]
        keys, values, saved = scan_forward(f, k, v, states_of_chunks(decays, ends, group.rank()), training)
        ctx.save_for_backward(projection, saved, decays)
        ctx.widths, ctx.group = widths, group
        return query, gate, *(x.transpose(0, 1).reshape(*query.shape[:3], -1) for x in (keys, values))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_gate, grad_k, grad_v):
        projection, saved, decays = ctx.saved_tensors
        _, _, k, v, f = _side_by_side(projection).split(ctx.widths, dim=-1)
        grad_k, grad_v = _side_by_side(grad_k), _side_by_side(grad_v)
        starts = _all_gather(adjoint_summary(f, grad_k, grad_v), ctx.group)  # [c, 2, 2, b * ng, hn]
        adjoints = states_of_chunks(decays, starts, ctx.group.rank(), back=True)

        grad = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
        out_query, out_gate, *_ = grad.split(ctx.widths, dim=-1)
        out_query.copy_(grad_query)
        out_gate.copy_(grad_gate)
        _, _, out_k, out_v, out_f = _side_by_side(grad).split(ctx.widths, dim=-1)
        scan_backward(f, k, v, saved, grad_k, grad_v, adjoints, (out_f, out_k, out_v))
        return grad, None, None, None


def _side_by_side(x: Tensor) -> Tensor:
    """A rank's two chunks as a batch: x [s, b, ng, n] -> [s / 2, 2, b * ng, n]. A view, where b and ng are one dimension in memory."""
    length, batch, groups, _ = x.shape
    return x.reshape(2, length // 2, batch * groups, -1).transpose(0, 1)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every rank: [...] -> [c, ...]."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered.unflatten(0, (group.size(), x.shape[0]))


# ---- attention -----------------------------------------------------------------------------------------------------------------------


def attention_context_parallel(
    q: Tensor, k: Tensor, v: Tensor, pattern: LayerPattern, softmax_scale: float, group: dist.ProcessGroup
) -> Tensor:
    """dilated_attention over the whole sequence for this rank's queries: q [s, b, np, hn], k, v [s, b, ng, hn] -> [s, b, np, hn].

    A dilated pattern gathers the kept keys and the sinks and receives a window's worth of keys before each chunk; dense and top-k ones
    gather every key. A chunk must be a multiple of the dilation.
    """
    return attend_by_head(q, k, v, pattern, lambda head, q, k, v: _attend(q, k, v, head, softmax_scale, group))


def _attend(q: Tensor, k: Tensor, v: Tensor, head: HeadPattern, softmax_scale: float, group: dist.ProcessGroup) -> Tensor:
    size, length, chunks = group.size(), q.shape[0] // 2, chunks_of(group.rank(), group.size())
    if head.is_dense or head.blocks or max(head.window, head.sinks) > length:
        kv = torch.cat([k, v], dim=2)  # [s, b, 2 ng, hn]: one message for both
        keys, values = torch.cat(in_sequence_order(gather_from_sequence_parallel_region(kv, group=group), size)).chunk(2, dim=2)
        if head.is_dense:  # chunk by chunk, each over the keys up to its end: without a mask of all [s, c * s] scores
            ends = [(chunk + 1) * length for chunk in chunks]
            outputs = [causal_attention(x, keys[:end], values[:end], softmax_scale) for x, end in zip(q.chunk(2), ends, strict=True)]
            return torch.cat(outputs)
        at = torch.cat([torch.arange(chunk * length, (chunk + 1) * length, device=q.device) for chunk in chunks])
        every = torch.arange(keys.shape[0], device=q.device)
        return dilated_attention(q, keys, values, LayerPattern((head,)), softmax_scale, at, every)

    if head.dilation is not None and length % head.dilation:
        raise ValueError(f"a context-parallel chunk of {length} tokens is not a multiple of the dilation of '{head}'")
    (*k_chunks, dilated_k, sinks_k, tails_k), (*v_chunks, dilated_v, sinks_v, tails_v) = (_Slices.apply(x, head) for x in (k, v))
    pairs = (dilated_k, dilated_v), (sinks_k, sinks_v), (tails_k, tails_v)
    # One message for keys and values, [..., b, 2 ng * hn]. More than four dimensions, and torch would launch a copy of each.
    dilated, sinks, tails = (torch.cat([x.flatten(-2) for x in pair], dim=-1) for pair in pairs)
    kept_k, kept_v = _keys_and_values(_gather_kept(dilated, sinks, head, group), k)
    kept_at = _kept_at(head, 2 * size * length)
    halos = _Halo.apply(tails, group) if head.window else tails
    outputs = []
    for chunk, q_chunk, keys, values, halo in zip(chunks, q.chunk(2), k_chunks, v_chunks, halos, strict=True):
        if head.window and chunk:  # before the first chunk there is nothing
            keys, values = (torch.cat(pair) for pair in zip(_keys_and_values(halo, k), (keys, values), strict=True))
        outputs.append(segment_attention(q_chunk, keys, values, kept_k, kept_v, kept_at, head, softmax_scale, chunk * length))
    return torch.cat(outputs)


class _Slices(torch.autograd.Function):
    """A rank's keys or values x [s, b, ng, hn] -> its first and second chunk, and what _shared() says that others need of them.

    One function, so that backward sums all gradients in one buffer: torch's slices would each fill one of x's length.
    """

    @staticmethod
    def forward(ctx, x, head):
        ctx.head = head
        ctx.set_materialize_grads(False)
        return *x.chunk(2), *_shared(x, head)

    @staticmethod
    @once_differentiable
    def backward(ctx, first, second, *others):
        grad = torch.cat([first, second])
        for place, other in zip(_shared(grad, ctx.head), others, strict=True):
            if other is not None and other.numel():
                place.add_(other)
        return grad, None


def _shared(x: Tensor, head: HeadPattern) -> tuple[Tensor, Tensor, Tensor]:
    """Views of x [s, b, ng, hn]: dilated keys [n, ...], the first S (the sinks, on the first rank), the chunks' last [2, window, ...]."""
    chunks = x.unflatten(0, (2, -1))
    dilated = x[:0] if head.dilation is None else x[head.dilation - 1 :: head.dilation]  # a chunk is whole dilation steps
    return dilated, x[: head.sinks], chunks[:, chunks.shape[1] - head.window :]


def _gather_kept(dilated: Tensor, sinks: Tensor, head: HeadPattern, group: dist.ProcessGroup) -> Tensor:
    """The sinks and dilated keys of the whole sequence, in order [N, b, m], from this rank's dilated [n, b, m] and first keys [S, b, m]."""
    parts = [_FromFirstRank.apply(sinks, group)] if head.sinks else [sinks]
    if head.dilation is not None:
        first, *later = in_sequence_order(gather_from_sequence_parallel_region(dilated, group=group), group.size())
        if head.sinks >= head.dilation:
            first = first[head.sinks // head.dilation :]  # those before are sinks too
        parts += [first, *later]
    return torch.cat(parts)


def _keys_and_values(kv: Tensor, k: Tensor) -> list[Tensor]:
    """The two parts of a message [n, b, 2 ng * hn] -> [n, b, ng, hn] as in k."""
    return [x.unflatten(-1, k.shape[2:]) for x in kv.chunk(2, dim=-1)]


@functools.cache
def _kept_at(head: HeadPattern, length: int) -> Tensor:
    """kept_positions(), on the CPU, where the torch implementation wants them; computed once, since no kernel reads them."""
    return kept_positions(head, length)


class _FromFirstRank(torch.autograd.Function):
    """The first rank's tensor on every rank; backward sums the gradients there."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, group_src=0, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.reduce(grad, group_dst=0, group=ctx.group)
        return grad if ctx.group.rank() == 0 else None, None


class _Halo(torch.autograd.Function):
    """The last tokens of this rank's chunks [2, w, ...] -> those before its first and second, [w, ...] each; zeros before the first.

    Neighbours in the sequence are neighbours in the group, so each rank talks to two others at most.
    """

    @staticmethod
    def forward(ctx, tails, group):
        ctx.group = group
        return _shift(*tails, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, before_first, before_second):
        return torch.stack(_shift(before_first, before_second, ctx.group, backward=True)), None


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
