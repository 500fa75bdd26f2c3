"""Lets runs on one node share Streaming's shared memory: one claims its blocks at a time, and what killed runs left is cleared first.

Streaming looks for the first free number and takes it in two steps, so two runs that start together may take the same. It refuses a cache
folder that, by its shared memory, is still in use; its own `clean_stale_shared_memory` takes all blocks there are, also those of live runs.
Here a block that some process has mapped stays. It also fails where a rank attaches to a block that another is just creating.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from unittest import mock

CHECKED = "rat_checked"  # our own block beside Streaming's: which shards this node has compared with their hashes

_PATIENCE = 60.0  # seconds

log = logging.getLogger(__name__)


@contextmanager
def claiming_shared_memory() -> Iterator[None]:
    """Around the construction of a StreamingDataset. Collective when torch.distributed is initialized: the first rank of each node holds a
    lock against this user's other runs there, and clears what killed ones left."""
    from streaming.base.distributed import barrier, get_local_rank

    # Beside what it guards: a folder for temporary files may be shared by nodes, which would wait for each other.
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    with open(folder / f"rat_megatron_{os.getuid()}.lock", "a") as lock:
        if get_local_rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file, or dying, gives it back
        clean_stale_shared_memory()
        with _attaching_patiently():
            yield
        barrier()


@contextmanager
def _attaching_patiently() -> Iterator[None]:
    """All ranks of a node create each block or, where it exists, attach to it, 7 ms later. On a busy node it may still have no size then,
    which ends the run: here it is waited for."""
    from streaming.base.shared import memory

    with mock.patch.object(memory, "BuiltinSharedMemory", _Sized):
        yield


class _Sized(SharedMemory):
    def __init__(self, name: str | None = None, create: bool = False, size: int = 0):
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return super().__init__(name, create, size)
            except ValueError:  # an empty file cannot be mapped
                self.close()
                if create or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def clean_stale_shared_memory() -> None:
    """Collective when torch.distributed is initialized: the first rank of each node cleans, the others wait for it."""
    from streaming.base.constant import SHM_TO_CLEAN
    from streaming.base.distributed import barrier, get_local_rank

    folder = Path("/dev/shm")
    if get_local_rank() == 0 and folder.is_dir():
        blocks = [path for path in folder.glob("[0-9]*_*") if path.name.partition("_")[2] in (*SHM_TO_CLEAN, CHECKED)]
        stale = _unmapped(blocks)
        if stale:  # or created a moment ago, and about to be mapped
            time.sleep(0.2)
        removed = 0
        for path in _unmapped(stale):
            with suppress(FileNotFoundError, PermissionError):  # live runs remove theirs; other users' are not ours to remove
                path.unlink()
                removed += 1
        if removed:
            log.warning("removed %d blocks of shared memory that a killed run left in %s", removed, folder)
    barrier()


def _unmapped(blocks: list[Path]) -> list[Path]:
    """The blocks that no process has mapped. They are listed before the processes: what a new run creates meanwhile is not among them."""
    mapped = "".join(map(_read_if_allowed, Path("/proc").glob("[0-9]*/maps"))) if blocks else ""
    return [path for path in blocks if f"{path}\n" not in mapped]


def _read_if_allowed(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another user's process, or one that just ended
        return ""
