"""The copy in host memory that a checkpoint is written from while training goes on, in memory that the writing process shares.

Megatron has its writer read the device's memory through CUDA's handles between processes. Those are not to be had of expandable segments
(PYTORCH_CUDA_ALLOC_CONF, as slurm/launch.sh sets it) nor in many containers; and the writer allocates anew at every save.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_ALIGNMENT = 256  # bytes
_THREADS = 4  # more are no faster
_PIECE = 256 << 20  # bytes that a thread touches at a time

WriteBuckets = list[tuple[str, str, tuple[list, list]]]
"""What Megatron's FileSystemWriterAsync writes: path, storage key, and (write item, data) pairs of bytes and of tensors, for each file."""


class HostMemory:
    """Memory of ``size`` bytes that the process it is sent to has too, there to be written to without a page fault."""

    def __init__(self, size: int):
        self.size, self._fd = size, os.memfd_create("checkpoint")  # no file of /dev/shm, which containers keep small
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)
        self.pinned = False
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(torch.Tensor.zero_, self._bytes().split(_PIECE)))
        self._release = self._at_the_end(os.close, self._fd)

    def pin(self) -> None:
        """Where there is CUDA, copies from the device are then as fast as its bus. Not while a CUDA graph is being captured."""
        if self.pinned or not torch.cuda.is_available():
            return
        at = self._bytes().data_ptr()
        self.pinned = int(torch.cuda.cudart().cudaHostRegister(at, self.size, 0)) == 0
        if self.pinned:
            # Before the memory is unmapped: CUDA would copy from these pages whatever comes to lie at their addresses.
            self._release.detach()
            self._release = self._at_the_end(_unpin_and_close, self._fd, at)

    def tensor(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        """A tensor in it, with a storage of just its size."""
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def close(self) -> None:
        """Gives the memory back, once no tensor is left in it here and no other process has it."""
        self._release()
        self._map.close()

    def __reduce__(self) -> tuple:
        return _attached, (f"/proc/{os.getpid()}/fd/{self._fd}", self.size)

    def _at_the_end(self, release: Callable[..., None], *of: int) -> weakref.finalize:
        finalizer = weakref.finalize(self, release, *of)
        finalizer.atexit = False
        return finalizer

    def _bytes(self) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8)


@dataclass
class HostCopy:
    """Buckets whose tensors lie in host memory; it can be sent to another process."""

    memory: HostMemory
    buckets: WriteBuckets  # places (offset, dtype, shape) where tensors were

    def in_place(self) -> WriteBuckets:
        """The buckets as they are written."""
        return _with_tensors(self.buckets, lambda place: self.memory.tensor(*place))


def copy_to_host(buckets: WriteBuckets, memory: HostMemory | None) -> HostCopy:
    """Copies every tensor, from wherever it is, into ``memory``, or more where that is too small; at the end all has been copied."""
    places: list[tuple[int, torch.dtype, torch.Size]] = []
    end = 0

    def place(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size]:
        nonlocal end
        places.append((end, tensor.dtype, tensor.shape))
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return places[-1]

    copied = _with_tensors(buckets, place)
    if memory is None or memory.size < end:
        if memory is not None:
            memory.close()
        memory = HostMemory(max(end, mmap.PAGESIZE))
    memory.pin()
    tensors = [tensor for _, _, (_, pairs) in buckets for _, tensor in pairs]
    for where, tensor in zip(places, tensors, strict=True):
        memory.tensor(*where).copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return HostCopy(memory, copied)


def available_memory() -> int:
    """Bytes of host memory to be had, within the limits of this process's control groups, such as a Slurm job's or a container's."""
    found = psutil.virtual_memory().available
    path = next((line[3:].strip() for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), None)  # version 2
    for group in () if path is None else (_CGROUPS / path.strip("/"), *(_CGROUPS / path.strip("/")).parents):
        limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
        if limit and used and limit[0].isdecimal():
            cache = next((int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith("inactive_file ")), 0)
            found = min(found, int(limit[0]) - int(used[0]) + cache)
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _with_tensors(buckets: WriteBuckets, change: Callable[[Any], Any]) -> WriteBuckets:
    return [
        (path, key, (in_bytes, [(item, change(tensor)) for item, tensor in in_tensors])) for path, key, (in_bytes, in_tensors) in buckets
    ]


def _attached(path: str, size: int) -> HostMemory:
    memory = object.__new__(HostMemory)
    with open(path, "r+b") as file:  # the map keeps it
        memory.size, memory._map = size, mmap.mmap(file.fileno(), size)
    return memory


def _unpin_and_close(fd: int, at: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(at)
    os.close(fd)
