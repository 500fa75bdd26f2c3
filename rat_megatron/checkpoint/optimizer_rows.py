"""The distributed optimizer's state in a checkpoint, by rows: every data-parallel rank writes and reads its own share, at any layout.

Megatron's "fully reshardable" checkpoints hold the states of each parameter in the parameter's shape, so that they load at any TP, PP and
DP; it gathers them whole on every rank, or on one, before anything is written. But a rank of the distributed optimizer updates a range of
elements that is contiguous in the flattened parameter, and so consists of whole rows but for its ends: here it writes those rows as they
are, and only pieces of rows that ranks share travel, to the rank that has the row's first element. On the disk it is the same format:
rectangles of the same tensors under the same names. Source: megatron/core/optimizer/distrib_optimizer.py, whose two methods these replace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements [start, end) of a flattened parameter that ``source`` updates and ``owner`` writes; ranks of the data-parallel group."""

    param: Tensor
    start: int
    end: int
    source: int
    owner: int


def owned_rows(start: int, end: int, width: int) -> tuple[int, int]:
    """Rows [first, last) of ``width`` elements whose first element lies in [start, end)."""
    return -(-start // width), -(-end // width)


def touched_rows(start: int, end: int, width: int) -> tuple[int, int]:
    """Rows [first, last) that have elements in [start, end)."""
    return start // width, -(-end // width)


def sharded_rows(self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None) -> dict[int, dict[str, Any]]:
    """In place of DistributedOptimizer.sharded_param_state_fully_reshardable: {index of the parameter: {state and part: ShardedTensor}}.

    To save, of the rows that this rank owns; to load, of those that it updates any element of.
    """
    blocks = _blocks(model_sharded_state_dict)
    pieces = {} if is_loading else _exchange(self)
    found: dict[int, dict[str, Any]] = {}
    for index, (param, ranges) in enumerate(_ranges(self)):
        mine = ranges.get(self.data_parallel_group.rank())
        if mine is None:
            continue
        start, end = mine
        width = _width(param)
        first, last = (touched_rows if is_loading else owned_rows)(start, end, width)
        states = {} if is_loading else _states(self, param)
        for name in _names(self):
            parts = []  # first row, values of whole rows
            if is_loading:
                parts = [(first, torch.empty((last - first) * width, dtype=torch.float32))]
            elif first < last:
                whole = last if last * width <= end else last - 1  # rows that this rank has all elements of
                parts = [(first, states[name][first * width - start : whole * width - start])]
                if whole < last:
                    others = pieces[param][name]
                    parts += [(whole, torch.cat([states[name][whole * width - start :].to(others.device), others]))]
            cut = [piece for row, values in parts for piece in _by_block(blocks[param], row, values)]
            for number, (block, row, values) in enumerate(cut):
                shard = _shard(block, f"optimizer.state.{name}", row, values, self.distributed_optimizer_instance_id)
                found.setdefault(index, {})[f"{name}.{number}"] = shard
    return found


@torch.no_grad()
def load_rows(self: Any, state_dict: dict[int, dict[str, Tensor]]) -> None:
    """In place of DistributedOptimizer.load_parameter_state_from_fully_reshardable: takes this rank's elements out of its rows."""
    for index, (param, ranges) in enumerate(_ranges(self)):
        mine = ranges.get(self.data_parallel_group.rank())
        if mine is None:
            continue
        (start, end), width = mine, _width(param)
        skipped = start - touched_rows(start, end, width)[0] * width
        states = {name: _joined(state_dict[index], name)[skipped : skipped + end - start] for name in _names(self)}
        self._set_main_param_and_optimizer_states(param, states)


def _exchange(optimizer: Any) -> dict[Tensor, dict[str, Tensor]]:
    """{parameter: {state: what other ranks update of the last row that this rank owns}}, fp32."""
    group = optimizer.data_parallel_group
    rank, ranks = group.rank(), group.size()
    pieces = [piece for param, ranges in _ranges(optimizer) for piece in shared_pieces(param, ranges)]
    names = _names(optimizer)
    device = torch.cuda.current_device()

    def elements(piece: Piece) -> list[Tensor]:
        states, (start, _) = _states(optimizer, piece.param), _range(optimizer, piece.param)
        return [states[name][piece.start - start : piece.end - start].to(device) for name in names]

    # Every rank knows all pieces, so that sizes need no exchange; both sides keep their order.
    gives = [[piece for piece in pieces if piece.source == rank and piece.owner == other] for other in range(ranks)]
    takes = [[piece for piece in pieces if piece.owner == rank and piece.source == other] for other in range(ranks)]
    given = [part for row in gives for piece in row for part in elements(piece)]
    sent = torch.cat(given) if given else torch.empty(0, dtype=torch.float32, device=device)
    coming, going = ([len(names) * sum(piece.end - piece.start for piece in row) for row in rows] for rows in (takes, gives))
    received = torch.empty(sum(coming), dtype=torch.float32, device=device)
    torch.distributed.all_to_all_single(received, sent, coming, going, group=group)
    found: dict[Tensor, dict[str, list[Tensor]]] = {}
    position = 0
    for piece in (piece for row in takes for piece in row):  # by rank, so that a row's pieces come in order
        for name in names:
            length = piece.end - piece.start
            found.setdefault(piece.param, {}).setdefault(name, []).append(received[position : position + length])
            position += length
    return {param: {name: torch.cat(parts) for name, parts in states.items()} for param, states in found.items()}


def shared_pieces(param: Tensor, ranges: dict[int, tuple[int, int]]) -> Iterator[Piece]:
    """What every rank but a row's owner has of it; ``ranges`` are the elements [start, end) of each rank, one after the other."""
    width = _width(param)
    owners: dict[int, int] = {}  # row -> rank, of rows that more than one rank has
    for rank, (start, end) in sorted(ranges.items()):
        if start % width and start // width in owners:  # the end of a row that began on another rank
            yield Piece(param, start, min(end, (start // width + 1) * width), rank, owners[start // width])
        first, last = owned_rows(start, end, width)
        if first < last and last * width > end:
            owners[last - 1] = rank


def _ranges(optimizer: Any) -> Iterator[tuple[Tensor, dict[int, tuple[int, int]]]]:
    """Every parameter, in the order of the buffers, with the elements [start, end) of it that each data-parallel rank updates."""
    ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for param, (start, end, bucket_index) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_index]
            share = bucket.grad_data.numel() // ranks
            ranges = {}
            for rank in range((start - bucket.offset) // share, min(ranks, -(-(end - bucket.offset) // share))):
                low, high = bucket.offset + rank * share, bucket.offset + (rank + 1) * share
                ranges[rank] = max(start, low) - start, min(end, high) - start
            yield param, ranges


def _range(optimizer: Any, param: Tensor) -> tuple[int, int]:
    """The elements of a parameter that this rank updates, as Megatron has them."""
    found = optimizer._get_model_param_range_map(param)["param"]
    return found.start, found.end


def _states(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """This rank's part of a parameter's states, flat, in fp32: views where the optimizer keeps them so, else copies in host memory."""
    states = optimizer._get_main_param_and_optimizer_states(param)
    found = {}
    for name in _names(optimizer):
        state = states[name].detach().flatten()
        own = state.dtype == torch.float32 and not optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        found[name] = state if own else state.float().cpu()
    return found


def _names(optimizer: Any) -> tuple[str, ...]:
    return ("param", *optimizer.optimizer_state_keys)


def _width(param: Tensor) -> int:
    return param.numel() // param.shape[0]


def _joined(shards: dict[str, Tensor], name: str) -> Tensor:
    """The rows of a state, flat, from the shards that they were loaded as."""
    return torch.cat([shards[f"{name}.{number}"].flatten() for number in range(len(shards)) if f"{name}.{number}" in shards])


def _blocks(model_sharded_state_dict: Any) -> dict[Tensor, list[ShardedTensor]]:
    """The tensors in a checkpoint that each parameter's rows go to, in order: one, or two of SwiGLU's fused gate and up projections."""
    tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    return {
        sharded.data: list(nested_values(sharded.build())) if isinstance(sharded, ShardedTensorFactory) else [sharded]
        for sharded in nested_values(tensors)
    }


def _by_block(blocks: list[ShardedTensor], row: int, values: Tensor) -> Iterator[tuple[ShardedTensor, int, Tensor]]:
    """Rows of a parameter from ``row`` on, flat, cut where its tensors in the checkpoint meet: with the tensor, and the row in it."""
    width, begin = math.prod(blocks[0].local_shape[1:]), 0
    rows = len(values) // width
    for block in blocks:
        end = begin + block.local_shape[0]
        first, last = max(row, begin), min(row + rows, end)
        if first < last:
            yield block, first - begin, values[(first - row) * width : (last - row) * width]
        begin = end


def _shard(whole: ShardedTensor, prefix: str, row: int, values: Tensor, instance: int) -> ShardedTensor:
    """Rows of a parameter's state, from ``row`` on, as a rectangle of the tensor in the checkpoint."""
    prepended = (1,) * whole.prepend_axis_num  # stacked layers
    values = values.view(*prepended, -1, *whole.local_shape[1:])
    offset = list(whole.global_offset)
    offset[whole.prepend_axis_num] += row
    return replace(
        whole,
        key=f"{prefix}.{whole.key}",
        data=values,
        dtype=values.dtype,
        local_shape=tuple(values.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # ranks have different numbers of rows
        replica_id=(*whole.replica_id[:-1], instance),  # no other data-parallel rank has these rows
        prepend_axis_num=0,
    )
