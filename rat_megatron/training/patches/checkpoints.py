"""What Megatron's reading and writing of checkpoints becomes: see ``table.py`` for the reasons."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import megatron.training.checkpointing as checkpointing
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.global_vars import get_args
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.hashes import check_hashes, unfinished, write_and_hash, write_hashes
from rat_megatron.checkpoint.torch_dist import latest_iteration
from rat_megatron.errors import RunFailed, UserError, one_line
from rat_megatron.files import DISK_FULL, atomic_file
from rat_megatron.training.monitoring.weights import all_finite

_TRIED_BYTES = 16 << 20
_READERS = 8


def without_strides(load_tensors_metadata: Callable) -> Callable:
    def load(self: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        metadata = metadata or FileSystemReader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                vars(entry.properties).pop("strides", None)
        return load_tensors_metadata(self, checkpoint_dir, metadata)

    return load


def without_what_is_left_out(determine_keys: Callable, args: Namespace) -> Callable:
    def determine(*metadata: Any) -> tuple[set[str], set[str]]:
        missing, unexpected = determine_keys(*metadata)
        # The state of --rerun-mode and the random states (RAT+ draws nothing) belong to ranks; a new run takes weights only.
        left_out = {key for key in missing if key in ("rerun_state_machine_state", "rng_state")}
        if args.finetune or args.no_load_optim:
            left_out |= {key for key in missing if key.startswith("optimizer.")}
        return missing - left_out, unexpected

    return determine


def lacking_fp8_state_only(determine_keys: Callable, args: Namespace) -> Callable:
    def determine(*metadata: Any) -> tuple[set[str], set[str]]:
        missing, unexpected = determine_keys(*metadata)
        lacking = _all_but_fp8_state(unexpected)
        if lacking and args.dist_ckpt_strictness == "log_unexpected":
            raise UserError(f"the checkpoint lacks {_some(lacking)}: give the flags it was written with")
        return missing, unexpected

    return determine


def with_weights_whole(load_state_dict: Callable) -> Callable:
    def load(self: Any, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        keys = load_state_dict(self, state_dict, strict=False, **kwargs)
        wrong = _all_but_fp8_state([*keys.missing_keys, *keys.unexpected_keys])
        if wrong:
            raise UserError(f"the checkpoint does not fit the model in {_some(wrong)}: give the flags it was written with")
        return keys

    return load


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


def with_hashes(save: Callable) -> Callable:
    """Wraps ``dist_checkpointing.save``: the folder's files are hashed once they are written, and gone if they cannot be.

    With --async-save both happen in the training loop, when Megatron finalizes the checkpoint; there, too, before the tracker moves.
    """

    def save_hashed(sharded_state_dict: Any, checkpoint_dir: str, *rest: Any, **kwargs: Any) -> Any:
        folder = Path(checkpoint_dir)
        if torch.distributed.get_rank() == 0:  # what was there before, of this iteration or of half of it
            unfinished(folder).touch()
            for path in folder.iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)
        torch.distributed.barrier()
        if kwargs.get("async_sharded_save"):
            for sharded in nested_values(sharded_state_dict):
                # What is on a device is copied before training goes on; what is in host memory, as with --optimizer-cpu-offload, is shared.
                if isinstance(sharded, ShardedTensor | ShardedTensorFactory) and sharded.data.device.type == "cpu":
                    sharded.data = sharded.data.clone()
        with _whole_or_gone(folder):
            request = save(sharded_state_dict, checkpoint_dir, *rest, **kwargs)
            if request is None:
                write_hashes(folder)
                return None
        finalize = [*request.finalize_fns, partial(write_hashes, folder)]
        request.finalize_fns[:] = [_whole_or_gone(folder)(function) for function in finalize]
        return request._replace(async_fn=partial(write_and_hash, request.async_fn, folder)) if request.async_fn else request

    return save_hashed


def one_at_a_time(save_checkpoint: Callable) -> Callable:
    def save(*args: Any, **kwargs: Any) -> None:
        maybe_finalize_async_save(blocking=True)
        save_checkpoint(*args, **kwargs)

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


def in_threads(read_data: Callable) -> Callable:
    """Wraps torch's ``FileSystemReader.read_data``: threads share the tensors of a plan out; reading and copying let the others run."""

    def read(self: Any, plan: Any, planner: Any) -> Any:
        shares = [replace(plan, items=plan.items[start::_READERS]) for start in range(_READERS)]
        with ThreadPoolExecutor(_READERS) as threads:
            # A planner may note which tensor it is about to load, so that each thread has one; what they load into is the same.
            done = list(threads.map(lambda share: read_data(self, share, copy(planner)), shares))
        return done[0]

    return read


def with_files_checked(load_base_checkpoint: Callable) -> Callable:
    """Wraps ``_load_global_dist_base_checkpoint``, which Megatron calls first for the arguments and then for all."""
    checked: set[Path] = set()

    def load(load_dir: str, args: Namespace, rank0: bool, state: Any, iteration: int, release: bool, *rest: Any, **kwargs: Any) -> Any:
        folder = Path(checkpointing.get_checkpoint_name(load_dir, iteration, release, return_base_dir=True))
        if folder not in checked and folder.is_dir() and torch.distributed.is_initialized():
            check_hashes(folder)
            checked.add(folder)
        return load_base_checkpoint(load_dir, args, rank0, state, iteration, release, *rest, **kwargs)

    return load


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


def with_finite_weights(load_checkpoint: Callable, args: Namespace) -> Callable:
    def load(model: list, *rest: Any, **kwargs: Any) -> Any:
        result = load_checkpoint(model, *rest, **kwargs)
        if not all_finite(model):
            raise UserError(
                f"the weights of iteration {result[0]}, loaded from {args.load or args.pretrained_checkpoint}, are not finite: resume from "
                f"an iteration before, by writing it into {TRACKER_NAME} there"
            )
        return result

    return load


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


class AtomicTracker:
    """Megatron's file access, except that ``latest_checkpointed_iteration.txt`` of a folder appears whole or not at all."""

    def __init__(self, file_access: Any):
        self._file_access = file_access

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file_access, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any):
        if mode == "w" and os.path.basename(path) == TRACKER_NAME and "://" not in path:  # a store's objects appear whole
            return atomic_file(Path(path))
        return self._file_access.open(path, mode, **kwargs)


def _all_but_fp8_state(keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if not key.endswith("._extra_state"))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
