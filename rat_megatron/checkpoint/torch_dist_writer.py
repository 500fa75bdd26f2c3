"""Writes a Megatron torch_dist checkpoint in one process, tensor by tensor: each is asked for when its turn to be written has come.

The layout is the one Megatron's loader reads (``checkpoint.py`` describes it): DCP, the layers' tensors stacked along a first axis with
one chunk a layer, the arguments in an object ``common_state``, and ``metadata.json``.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor to write. With ``layers`` there is one such tensor for each layer, stacked along a first axis."""

    shape: torch.Size
    dtype: torch.dtype
    layers: int | None = None


def write_torch_dist(
    folder: Path, tensors: Mapping[str, StoredTensor], read: Callable[[str, int], torch.Tensor], common: dict[str, Any], objects: list[str]
) -> None:
    """Writes the tensors, which ``read(key, layer)`` gives one by one, the common state, and empty objects under the keys ``objects``."""
    planner = _LazyPlanner(tensors, read, {"common_state/shard_0_1": common} | dict.fromkeys(objects))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is not a distributed run
        save({}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class _LazyPlanner(DefaultSavePlanner):
    """Plans from shapes alone, and gives DCP each tensor or object when it writes it."""

    def __init__(self, tensors: Mapping[str, StoredTensor], read: Callable[[str, int], torch.Tensor], objects: dict[str, Any]):
        super().__init__(flatten_state_dict=False)
        self._tensors, self._read, self._objects = tensors, read, objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        for key, tensor in self._tensors.items():
            items += [_write_item(key, tensor, layer) for layer in range(tensor.layers or 1)]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key, offset = write_item.index.fqn, write_item.index.offset
        if write_item.type is WriteItemType.BYTE_IO:
            stored = io.BytesIO()
            torch.save([self._objects[key]], stored)  # Megatron wraps an object in a list of its shards
            return stored
        if self._tensors[key].layers is None:
            return self._read(key, 0)
        return self._read(key, offset[0])[None]


def _write_item(key: str, tensor: StoredTensor, layer: int) -> WriteItem:
    size, offset, chunk = tensor.shape, torch.Size([0] * len(tensor.shape)), tensor.shape
    if tensor.layers is not None:
        size, offset, chunk = torch.Size([tensor.layers, *size]), torch.Size([layer, *offset]), torch.Size([1, *chunk])
    data = TensorWriteData(ChunkStorageMetadata(offset, chunk), TensorProperties(dtype=tensor.dtype), size)
    return WriteItem(MetadataIndex(key, offset), WriteItemType.SHARD, tensor_data=data)
