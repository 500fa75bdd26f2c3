"""Every patch of Megatron, each with its reason. tests/unit/test_megatron_hooks.py fails when Megatron changes beneath one.

What a machine without CUDA needs beyond these is in rat_megatron/platform/cpu.py.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.training.checkpointing as checkpointing
import megatron.training.initialize as initialize
import megatron.training.training as training
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.msc_utils import maybe_msc
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rat_megatron.pattern import AttentionPattern
from rat_megatron.training.arl import arl_train_step, step_loaded_first
from rat_megatron.training.flops import iteration_flops
from rat_megatron.training.metrics import RunReport
from rat_megatron.training.patterns_eval import evaluate_patterns, record_losses


def install_hooks(args: Namespace) -> None:
    """Puts RAT+ into Megatron's loop, for validated arguments. Call once, before ``pretrain``."""
    target = AttentionPattern.parse(args.rat_pattern)
    report = RunReport(Path(args.save) if args.save else None)

    # The wheel brings Megatron's dataset helpers compiled and no Makefile: the make that this function runs would end the program.
    initialize._compile_dependencies = lambda: None

    # One iteration is two steps on microbatches drawn beforehand, and its duration is noted; train() calls the module's global.
    if args.rat_arl_pattern != "none":
        training.train_step = arl_train_step(training.train_step, AttentionPattern.parse(args.rat_arl_pattern), target)
    training.train_step = report.timed(step_loaded_first(training.train_step))

    # Validation under every pattern, and into report.json.
    patterns = [AttentionPattern.parse(word) for word in args.rat_eval_patterns]
    training.evaluate = record_losses(training.evaluate, target, report)
    training.evaluate_and_print_results = evaluate_patterns(training.evaluate_and_print_results, patterns, target, report)

    # The forget gate, sparse patterns and the second step count too.
    training.num_floating_point_operations = iteration_flops

    # RAT+ decays every parameter, norms included.
    training.get_megatron_optimizer_config = _decay_every_parameter(training.get_megatron_optimizer_config)

    # Checking a checkpoint's keys (--dist-ckpt-strictness) fails on the strides that newer versions of torch note beside them.
    TorchDistLoadShardedStrategy.load_tensors_metadata = _without_strides(TorchDistLoadShardedStrategy.load_tensors_metadata)

    # A finished run that is started again would write its last checkpoint over itself, and a kill meanwhile would lose it.
    training.save_checkpoint_and_time = _unless_saved(training.save_checkpoint_and_time, args)

    # A kill between opening and writing the tracker file would leave it empty, and with it no checkpoint to resume from.
    checkpointing.maybe_msc = _AtomicTracker()


def _decay_every_parameter(get_megatron_optimizer_config):
    def get_config(args: Any):
        config, overrides = get_megatron_optimizer_config(args)
        return config, {key: value for key, value in overrides.items() if value.get("wd_mult") != 0.0}

    return get_config


def _without_strides(load_tensors_metadata: Callable) -> Callable:
    def load(self: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        metadata = metadata or FileSystemReader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                vars(entry.properties).pop("strides", None)
        return load_tensors_metadata(self, checkpoint_dir, metadata)

    return load


def _unless_saved(save_checkpoint_and_time: Callable, args: Namespace) -> Callable:
    def save(iteration: int, *rest: Any, **kwargs: Any) -> None:
        if args.load != args.save or iteration != args.iteration:  # the iteration that was loaded
            save_checkpoint_and_time(iteration, *rest, **kwargs)

    return save


class _AtomicTracker:
    """Megatron's file access, except that ``latest_checkpointed_iteration.txt`` appears whole or not at all."""

    def __getattr__(self, name: str) -> Any:
        return getattr(maybe_msc, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any):
        if mode == "w" and os.path.basename(path) == "latest_checkpointed_iteration.txt":
            return _replacing(path)
        return maybe_msc.open(path, mode, **kwargs)


class _replacing:
    """A text file opened for writing that takes its place when it is closed without an error."""

    def __init__(self, path: str):
        self._path = path
        self._file = open(path + ".tmp", "w")

    def __enter__(self):
        return self._file

    def __exit__(self, error_type, *_):
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if error_type is None:
            os.replace(self._path + ".tmp", self._path)
