"""What Megatron's reading and writing of checkpoints becomes: see ``table.py`` for the reasons."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rat_megatron.checkpoint.torch_dist import TRACKER_NAME
from rat_megatron.errors import UserError
from rat_megatron.files import atomic_file


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
