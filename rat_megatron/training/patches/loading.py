"""What Megatron's reading of checkpoints becomes: see ``table.py`` for the reasons."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.training.checkpointing as checkpointing
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.hashes import begin_check
from rat_megatron.errors import UserError
from rat_megatron.training.monitoring.weights import all_finite

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
    """Wraps ``_load_global_dist_base_checkpoint``, which Megatron calls first for the arguments and then for all: files are hashed while
    they are loaded, and nothing goes on from one that is damaged."""
    checked: set[Path] = set()

    def load(load_dir: str, args: Namespace, rank0: bool, state: Any, iteration: int, release: bool, *rest: Any, **kwargs: Any) -> Any:
        folder = Path(checkpointing.get_checkpoint_name(load_dir, iteration, release, return_base_dir=True))
        if not folder.is_dir() or not torch.distributed.is_initialized():
            return load_base_checkpoint(load_dir, args, rank0, state, iteration, release, *rest, **kwargs)
        finish = None if rank0 or folder in checked else begin_check(folder)
        try:
            loaded = load_base_checkpoint(load_dir, args, rank0, state, iteration, release, *rest, **kwargs)
        except (UserError, OSError):
            raise
        except Exception:  # damaged bytes lead to any kind; torch raises it on every rank
            (finish or begin_check(folder))()
            raise
        if finish:
            finish()
            checked.add(folder)
        return loaded

    return load


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


def _all_but_fp8_state(keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if not key.endswith("._extra_state"))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
