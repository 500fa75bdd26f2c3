"""Reads and writes Megatron torch_dist checkpoints in one process: the arguments, and one tensor at a time, without building the model.

The folder is a PyTorch DCP checkpoint (``.metadata`` and ``__*_*.distcp``) whose non-tensor part Megatron stores as the object
``common_state`` (older versions: the file ``common.pt``); ``metadata.json`` says so. Both pickles are read with a list of allowed
classes, so that opening a checkpoint never runs code that came with it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.hashes import check_quickly, damaged, has_hashes, write_hashes
from rat_megatron.errors import UserError, one_line

# The arguments that say what a checkpoint's weights mean. None of them is filled in later by Megatron's validation.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "swiglu",
    "rat_recurrence",
)

_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    *(
        (_DCP + "metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_DCP + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((_DCP + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
}


def read_checkpoint_args(checkpoint: Path, step: int | None = None) -> Namespace:
    """The arguments that a checkpoint was trained with; raises UserError as TorchDistCheckpoint does, and for files that are not whole."""
    folder = find_iteration(checkpoint, step)
    check_quickly(folder)
    try:
        return TorchDistCheckpoint(folder).args()
    except UserError as error:
        if has_hashes(folder):
            raise damaged(folder, str(error), by_size=True) from error
        raise


def find_iteration(checkpoint: Path, step: int | None = None) -> Path:
    """The folder ``iter_0000020`` of one step of a checkpoint (default: the latest), or the given folder if it is one already."""
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not a folder: give the folder that Megatron's --save wrote")
    if step is not None and step < 0:
        raise UserError(f"iteration {step} cannot be: give the number of one of the folders iter_* in {checkpoint}")
    tracker = checkpoint / TRACKER_NAME
    if step is None and (checkpoint / ".metadata").exists():
        return checkpoint
    if step is None and not tracker.is_file():
        raise UserError(f"{checkpoint} holds no checkpoint (no {TRACKER_NAME})")
    latest = latest_iteration(checkpoint) if step is None else str(step)
    there = f"(iterations in {checkpoint}: {', '.join(sorted(path.name for path in checkpoint.glob('iter_*'))) or 'none'})"
    if not re.fullmatch(r"\d+|release", latest or ""):
        raise UserError(f"{tracker} says '{latest}', which is neither an iteration nor 'release': write one into it {there}")
    folder = checkpoint / (latest if latest == "release" else f"iter_{int(latest):07d}")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist {there}")
    return folder


def latest_iteration(checkpoint: Path) -> str | None:
    """What the tracker file of a checkpoint folder says, an iteration or ``release``; None where there is no such file."""
    tracker = checkpoint / TRACKER_NAME
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None


class TorchDistCheckpoint:
    """One iteration's folder. ``tensors`` maps every stored tensor's key to its DCP metadata (size, dtype, chunks); ``objects`` are the
    keys of all else.

    Raises UserError when the folder is no finished torch_dist checkpoint or its pickles hold classes that are not allowed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        _check_format(folder)
        self._reader = FileSystemReader(folder)
        self._metadata = _read_metadata(folder / ".metadata")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_lengths()
        stored = self._metadata.state_dict_metadata
        self.tensors = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self.objects = [key for key in stored if key not in self.tensors]

    def args(self) -> Namespace:
        """Megatron's arguments, as they were when the checkpoint was written."""
        return self.common()["args"]

    def common(self) -> dict[str, Any]:
        """What Megatron keeps once for all ranks: ``args``, ``iteration`` and more."""
        legacy = self.folder / "common.pt"
        if legacy.is_file():
            common = _load_allowed(io.BytesIO(legacy.read_bytes()), legacy)
        else:
            key = next((key for key in self.objects if key.split("/")[0] == "common_state"), None)
            if key is None:
                raise UserError(f"{self.folder} has no arguments in it (neither common_state nor common.pt)")
            (common,) = _load_allowed(self.read_object(key), self.folder)  # Megatron wraps the object in a list of its shards
        if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
            raise UserError(f"{self.folder} has no arguments in it: it was not written by Megatron's training loop")
        return common

    def read_object(self, key: str) -> io.BytesIO:
        """An object as it is stored, not unpickled."""
        destination, at, nothing = _Bytes(), MetadataIndex(key), torch.Size([0])
        self._read([ReadItem(LoadItemType.BYTE_IO, at, nothing, at, nothing, nothing)], destination)
        return destination.value

    def read(self, key: str, index: int | None = None) -> torch.Tensor:
        """A tensor in full, or its slice at one index of the first axis; only the chunks that hold it are read."""
        stored = self.tensors[key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if index is not None:
            offsets[0], sizes[0] = index, 1
        destination = _Tensor(torch.empty(sizes, dtype=stored.properties.dtype))
        items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))])
        if sum(item.lengths.numel() for item in items) != destination.value.numel():
            raise UserError(f"{self.folder} holds only parts of {key}: the checkpoint is damaged")
        self._read(items, destination)
        return destination.value if index is None else destination.value[0]

    def _check_lengths(self) -> None:
        """Raises UserError for the first file that is shorter than what it holds: older checkpoints have no hashes."""
        ends: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing: the checkpoint is incomplete")
            if (size := path.stat().st_size) < end:
                raise UserError(f"{path} is damaged, it has {size} bytes instead of {end}: resume from another iteration")

    def _read(self, items: list[ReadItem], destination: DefaultLoadPlanner) -> None:
        try:
            self._reader.read_data(LoadPlan(items), destination).wait()
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: the checkpoint is incomplete") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{self.folder} cannot be read, its files are damaged: {one_line(error)}") from error


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor to write. With ``layers`` there is one such tensor for each layer, stacked along a first axis."""

    shape: torch.Size
    dtype: torch.dtype
    layers: int | None = None


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    read: Callable[[str, int], torch.Tensor],
    common: dict[str, Any],
    objects: Mapping[str, io.BytesIO],
) -> None:
    """Writes the tensors, which ``read(key, layer)`` gives when their turn has come, the common state, and objects from stored_object().

    A layer's tensors are stacked along a first axis with one chunk a layer, as Megatron's loader reads them. Raises what ``read`` raises.
    """
    planner = _LazyPlanner(tensors, read, {"common_state/shard_0_1": stored_object(common), **objects})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is not a distributed run
        try:
            save({}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
        except CheckpointException as error:
            reason, _ = error.failures[0]
            raise reason from None
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    write_hashes(folder)


def stored_object(value: Any) -> io.BytesIO:
    """An object as Megatron stores it: in a list of its shards."""
    stored = io.BytesIO()
    torch.save([value], stored)
    return stored


# ---- reading -------------------------------------------------------------------------------------------------------------------------


class _Tensor(DefaultLoadPlanner):
    """Tells DCP to put what it reads into one tensor."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.value[tuple(slice(at, at + n) for at, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: resolve_tensor gave a view."""


class _Bytes(DefaultLoadPlanner):
    """Tells DCP to hand an object over as it is stored, where its own planner would unpickle it."""

    def __init__(self):
        super().__init__()
        self.value = io.BytesIO()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = value


def _check_format(folder: Path) -> None:
    try:
        backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except FileNotFoundError:
        raise UserError(f"{folder} has no metadata.json: it is no torch_dist checkpoint, or it was not written to its end") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'metadata.json'} does not say how the checkpoint is stored: it is damaged") from None
    if backend != "torch_dist":
        raise UserError(f"{folder} is stored as '{backend}': only checkpoints of --ckpt-format torch_dist can be read")
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} has no .metadata file: the checkpoint is incomplete")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")


class _Refused(Exception):
    """A class that is not on the list; the message is its name."""


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _Refused as error:
        raise _refusal(path, str(error)) from None
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, ImportError, MemoryError) as error:
        raise UserError(f"{path} cannot be read, it is damaged: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} holds a {type(metadata).__name__} instead of DCP metadata")
    return metadata


def _load_allowed(data: io.BytesIO, source: Path) -> Any:
    """torch.load of an object whose classes are torch's safe ones or those that Megatron itself allows in its checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Apex and Transformer Engine are missing is of no concern here
        from megatron.core.safe_globals import SAFE_GLOBALS  # here because it takes seconds, and --help should not

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        try:
            if refused := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(data)):
                raise _refusal(source, refused[0])
            data.seek(0)
            return torch.load(data, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(f"the arguments in {source} cannot be read: {one_line(error)}") from error


def _refusal(source: Path, name: str) -> UserError:
    return UserError(f"{source} holds an object of the class {name}, which is not on the list of those that are safe to load")


# ---- writing -------------------------------------------------------------------------------------------------------------------------


class _LazyPlanner(DefaultSavePlanner):
    """Plans from shapes alone, and gives DCP each tensor or object when it writes it."""

    def __init__(self, tensors: Mapping[str, StoredTensor], read: Callable[[str, int], torch.Tensor], objects: Mapping[str, io.BytesIO]):
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
            return self._objects[key]
        if self._tensors[key].layers is None:
            return self._read(key, 0)
        return self._read(key, offset[0])[None]


def _write_item(key: str, tensor: StoredTensor, layer: int) -> WriteItem:
    size, offset, chunk = tensor.shape, torch.Size([0] * len(tensor.shape)), tensor.shape
    if tensor.layers is not None:
        size, offset, chunk = torch.Size([tensor.layers, *size]), torch.Size([layer, *offset]), torch.Size([1, *chunk])
    data = TensorWriteData(ChunkStorageMetadata(offset, chunk), TensorProperties(dtype=tensor.dtype), size)
    return WriteItem(MetadataIndex(key, offset), WriteItemType.SHARD, tensor_data=data)
