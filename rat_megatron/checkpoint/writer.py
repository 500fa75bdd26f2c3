"""The process of each rank that writes checkpoints while training goes on, and the one that carries its answers back.

Both end with the training process, however that ends: what outlived a killed run would hold its host memory. Megatron starts them.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from rat_megatron.checkpoint.hashes import hash_own_files
from rat_megatron.checkpoint.host_copy import HostCopy


def writing_loop(training: int, *args: Any, **kwargs: Any) -> None:
    """Megatron's PersistentAsyncCaller.async_loop, in the writer of the process with the id ``training``."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with(training)
    PersistentAsyncCaller.async_loop(*args, **kwargs)


def write_and_hash(write: Callable, folder: Path, rank: int, copy: HostCopy, results: Any) -> None:
    """A rank's writing of its files, in the writer: hashed there too, so that training need not wait for it."""
    write(rank, copy.in_place(), results)
    hash_own_files(folder, rank)


def results_queue() -> Any:
    """The queue for what writers found, in a process of its own."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=end_with, initargs=(os.getpid(),))
    return manager.Queue()


def end_with(process: int) -> None:
    """Has this process end when another does: it need not be the parent, as Megatron's writer is a child of multiprocessing's server."""
    try:
        alive = os.pidfd_open(process)
    except ProcessLookupError:  # while this one was starting
        os._exit(1)

    def wait() -> None:
        select.select([alive], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end with training", daemon=True).start()
