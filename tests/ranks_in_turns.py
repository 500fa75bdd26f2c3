"""The ranks of context parallelism one after the other in one process, for tests of the kernels without several GPUs."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from torch import Tensor

from rat_megatron.parallel import context_parallel
from rat_megatron.parallel.context_parallel import chunks_of, scan_mixed_qkv_context_parallel


def scan_in_turns(monkeypatch, projection: Tensor, query_width: int, weights: list[Tensor], size: int) -> list[Tensor]:
    """scan_mixed_qkv_context_parallel() of a whole sequence's projection [s, b, ng, width], cut for ``size`` ranks.

    Returns, whole again, its four outputs and the projection's gradient under weights on them. A rank's part lies in memory as a
    Megatron layer's does, or with the batch outermost if the projection does.
    """
    batch_outermost = projection.stride(1) > projection.stride(0)
    parts = [own_part(projection.detach(), rank, size) for rank in range(size)]
    if batch_outermost:
        parts = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts]
    groups = [SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size) for rank in range(size)]

    def exchange(run):
        """run(rank) of every rank: as far as what each sends, then with all of it."""
        sent = []

        def send(x, group):
            sent.append(x)
            raise _Sent

        with monkeypatch.context() as patch:
            patch.setattr(context_parallel, "_all_gather", send)
            for rank in range(size):
                with contextlib.suppress(_Sent):
                    run(rank)
            patch.setattr(context_parallel, "_all_gather", lambda x, group: torch.stack(sent))
            return [run(rank) for rank in range(size)]

    parts = [part.requires_grad_() for part in parts]
    outputs = exchange(lambda rank: scan_mixed_qkv_context_parallel(parts[rank], query_width, groups[rank]))
    own_weights = [[own_part(x, rank, size) for x in weights] for rank in range(size)]
    gradients = exchange(lambda rank: torch.autograd.grad(outputs[rank], parts[rank], own_weights[rank], retain_graph=True))
    return [_whole(of_ranks) for of_ranks in zip(*((*out, *grad) for out, grad in zip(outputs, gradients, strict=True)), strict=True)]


def own_part(x: Tensor, rank: int, size: int) -> Tensor:
    """A rank's two chunks of a whole sequence [s, ...]."""
    chunks = x.chunk(2 * size)
    return torch.cat([chunks[index] for index in chunks_of(rank, size)])


class _Sent(Exception):
    pass


def _whole(parts: tuple[Tensor, ...]) -> Tensor:
    chunks = {}
    for rank, part in enumerate(parts):
        chunks |= zip(chunks_of(rank, len(parts)), part.chunk(2), strict=True)
    return torch.cat([chunks[index] for index in range(2 * len(parts))])
