"""What Megatron's writing of checkpoints becomes: see ``table.py`` for the reasons."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.global_vars import get_args
from torch.distributed.checkpoint.api import CheckpointException

from rat_megatron.checkpoint import ADAPTED_NAME, TRACKER_NAME
from rat_megatron.checkpoint.hashes import unfinished, write_hashes
from rat_megatron.checkpoint.host_copy import HostMemory, available_memory, copy_to_host
from rat_megatron.checkpoint.retention import remove_old
from rat_megatron.checkpoint.torch_dist import latest_iteration
from rat_megatron.checkpoint.writer import write_and_hash
from rat_megatron.errors import RunFailed, one_line
from rat_megatron.files import DISK_FULL, atomic_file
from rat_megatron.training.monitoring.weights import all_finite

SECONDS_NAME = "checkpoint_seconds"
"""The file beside the checkpoints that says how long the last save took, until it was whole; slurm/launch.sh reads it."""

_TRIED_BYTES = 16 << 20
_BYTES_OF_STATE = 12  # of a parameter: fp32 weight and two moments
_MARGIN = 1.06  # shares of ranks differ, as tensors are written by one each


class Saves:
    """The saves of one run: one at a time, in the background where the host has the memory, and what is to be done when one is whole."""

    def __init__(self, args: Namespace):
        self._args, self._begun = args, 0.0
        self._memory: Future[HostMemory] | None = None
        self._removal: threading.Thread | None = None

    def with_memory(self, train: Callable) -> Callable:
        """Wraps Megatron's ``train``: the host memory of saves in the background is taken while the first iterations run."""

        def with_memory_taken(forward_step_func: Callable, model: list, *rest: Any, **kwargs: Any) -> Any:
            if self._args.save and self._has_room(model):
                size = int(_bytes_a_rank(model) * _MARGIN)
                with ThreadPoolExecutor(1, "host memory of checkpoints") as thread:
                    self._memory = thread.submit(HostMemory, size)
                    return train(forward_step_func, model, *rest, **kwargs)
            return train(forward_step_func, model, *rest, **kwargs)

        return with_memory_taken

    def one_at_a_time(self, save_checkpoint: Callable) -> Callable:
        """Wraps Megatron's ``save_checkpoint``."""
        args = self._args

        def save(iteration: int, model: list, *rest: Any, **kwargs: Any) -> None:
            maybe_finalize_async_save(blocking=True)
            self._begun = time.monotonic()
            background, args.async_save = args.async_save, args.async_save and self._has_room(model)
            try:
                save_checkpoint(iteration, model, *rest, **kwargs)
            finally:
                args.async_save = background

        return save

    def with_hashes(self, save: Callable) -> Callable:
        """Wraps ``dist_checkpointing.save``: the folder's files are hashed once they are written, and gone if they cannot be.

        With --async-save all tensors are copied to host memory here; writing and hashing are the writer's, and the rest is done in the
        training loop, when Megatron finalizes the checkpoint; there, too, before the tracker moves.
        """

        def save_hashed(sharded_state_dict: Any, checkpoint_dir: str, *rest: Any, **kwargs: Any) -> Any:
            folder = Path(checkpoint_dir)
            if torch.distributed.get_rank() == 0:  # what was there before, of this iteration or of half of it
                unfinished(folder).touch()
                for path in (path for path in folder.iterdir() if path.name != ADAPTED_NAME):
                    path.unlink() if path.is_file() else shutil.rmtree(path)
            torch.distributed.barrier()
            with _whole_or_gone(folder):
                request = save(sharded_state_dict, checkpoint_dir, *rest, **kwargs)
                if request is None:
                    write_hashes(folder)
                    return None
            finalize = [*request.finalize_fns, partial(write_hashes, folder)]
            request.finalize_fns[:] = [_whole_or_gone(folder)(function) for function in finalize]
            if not request.async_fn:
                return request
            rank, buckets, results = request.async_fn_args
            copy = copy_to_host(buckets, self._memory.result() if self._memory else None)
            self._memory = Future()
            self._memory.set_result(copy.memory)
            return request._replace(
                async_fn=partial(write_and_hash, request.async_fn, folder), async_fn_args=(rank, copy, results), preload_fn=None
            )

        return save_hashed

    def noting_the_latest(self, file_access: Any) -> Any:
        """Wraps Megatron's file access: the tracker file is replaced in one step, after which older iterations may go."""
        return AtomicTracker(file_access, self._is_whole)

    def _is_whole(self, folder: Path) -> None:
        """On the first rank, when the tracker in ``folder`` names a new iteration."""
        if folder != Path(self._args.save):  # --non-persistent-ckpt-type global has a folder below
            return
        with atomic_file(folder / SECONDS_NAME) as file:
            file.write(f"{time.monotonic() - self._begun:.2f}\n")
        # --save-retain-interval alone: Megatron's word for the last one and every N-th.
        keep, every = self._args.rat_keep_checkpoints, self._args.save_retain_interval
        if keep or every:
            if self._removal is not None:  # of the save before
                self._removal.join()
            self._removal = threading.Thread(target=_remove, args=(folder, keep or 1, every), name="removing checkpoints")
            self._removal.start()

    def _has_room(self, model: list) -> bool:
        """Whether the host of every rank has memory for the copies of its ranks."""
        if self._memory is not None:
            return True
        wanted = _bytes_a_rank(model) * _MARGIN * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        available = available_memory()
        every: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, (available < wanted, wanted, available))
        lacks, wanted, available = max(every)
        if lacks and torch.distributed.get_rank() == 0:
            print(
                f"rat-megatron: no save in the background, which takes {wanted / 1e9:.3g} GB of host memory: a node has "
                f"{available / 1e9:.3g} GB",
                flush=True,
            )
        return not lacks


def _bytes_a_rank(model: list) -> float:
    """What a rank writes of weights and optimizer, about; precision-aware optimizers and Muon have less."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    of_model = sum(parameter.numel() * (parameter.element_size() + _BYTES_OF_STATE) for parameter in parameters)
    return of_model / mpu.get_data_parallel_world_size(with_context_parallel=True)


def unless_saved(save_checkpoint_and_time: Callable, args: Namespace) -> Callable:
    """Wraps ``save_checkpoint_and_time``: an iteration that this run has loaded from --save, or saved, is not written once more."""
    saved: set[int] = set()

    def save(iteration: int, *rest: Any, **kwargs: Any) -> None:
        loaded = args.load == args.save and iteration == args.iteration
        if loaded or iteration in saved:
            return
        save_checkpoint_and_time(iteration, *rest, **kwargs)
        if not kwargs.get("non_persistent_ckpt"):
            saved.add(iteration)

    return save


def of_a_living_writer(is_done: Callable) -> Callable:
    """Wraps PersistentAsyncCaller's ``is_current_async_call_done``."""

    def check(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while self.process and self.cur_item is None:
            alive = self.process.is_alive()  # asked first: what it has finished before its end counts
            try:
                self.cur_item = self._persistent_comp_q.get(timeout=0.1 if blocking else 0)
            except queue.Empty:
                if not alive:
                    code, self.process = self.process.exitcode, None  # closing must not wait for it either
                    self._persistent_queue.cancel_join_thread()
                    raise RunFailed(
                        f"the process that writes checkpoints has ended (exit code {code}), perhaps for want of memory: {_kept(get_args())}"
                    ) from None
                if not blocking:
                    break
        return is_done(self, blocking, no_dist)

    return check


def of_finite_weights(save_checkpoint: Callable, args: Namespace) -> Callable:
    def save(iteration: int, model: list, *rest: Any, **kwargs: Any) -> None:
        if not all_finite(model):
            raise RunFailed(
                f"the weights are not finite after iteration {iteration}, which is therefore not saved: {_kept(args)}, resume from it "
                "with a lower --lr or --clip-grad if it comes to this again"
            )
        try:
            save_checkpoint(iteration, model, *rest, **kwargs)
        except OSError as error:  # of the first rank's small files: the tracker and what is beside it
            raise RunFailed(f"iteration {iteration} cannot be saved in {args.save} ({error.strerror or error}): {_kept(args)}") from error

    return save


@contextmanager
def _whole_or_gone(folder: Path) -> Iterator[None]:
    """When writing fails, on whichever rank, nothing is left of the iteration's folder and the run ends in a sentence."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        reason = [_no_room(folder) or one_line(error)]
        if isinstance(error, CheckpointException):  # raised on every rank; the first one's reason serves all
            torch.distributed.broadcast_object_list(reason, src=0)
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # where nothing can be written, it cannot be removed either
                unfinished(folder).unlink(missing_ok=True)
        raise RunFailed(f"{folder} could not be written, and what there was of it is removed: {reason[0]}; {_kept(get_args())}") from error


def _no_room(folder: Path) -> str | None:
    """Whether a full disk is what stopped a save: Megatron passes on the class of a writer's error only, so a small file is tried."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in DISK_FULL:
            return f"{os.strerror(error.errno).lower()}, make room and start the run again"
    return None


def _kept(args: Namespace) -> str:
    latest = latest_iteration(Path(args.save))
    return "there is no checkpoint before" if latest is None else f"the latest checkpoint is still that of iteration {latest}"


def nothing(*_: Any, **__: Any) -> None:
    """In the place of Megatron's removal of a checkpoint, which it runs in a process of its own."""


def _remove(folder: Path, keep: int, every: int | None) -> None:
    try:
        remove_old(folder, keep, every)
    except OSError as error:
        print(f"rat-megatron: old iterations in {folder} cannot be removed ({error.strerror or error})", flush=True)


class AtomicTracker:
    """Megatron's file access, except that ``latest_checkpointed_iteration.txt`` of a folder appears whole or not at all."""

    def __init__(self, file_access: Any, then: Callable[[Path], None]):
        self._file_access, self._then = file_access, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file_access, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if mode == "w" and os.path.basename(path) == TRACKER_NAME and "://" not in path:  # a store's objects appear whole
            return self._replaced(Path(path))
        return self._file_access.open(path, mode, **kwargs)

    @contextmanager
    def _replaced(self, path: Path) -> Iterator[Any]:
        with atomic_file(path) as file:
            yield file
        self._then(path.parent)
