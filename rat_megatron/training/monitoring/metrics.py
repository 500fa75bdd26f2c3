"""What a run measures, kept in ``report.json`` beside its checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training.global_vars import get_args

from rat_megatron.files import write_json
from rat_megatron.training.arguments.data import ONE_SET

REPORT_NAME = "report.json"


class RunMetrics:
    """The latest validation loss of every pattern, on every validation set, and the training speed.

    ``report.json`` holds ``{"iteration", "consumed_samples", "pattern", "recurrence", "patterns": {word: validation loss},
    "tokens_per_second"}``; with several validation sets, ``"validation_sets": {name: {word: loss}}`` in the place of ``"patterns"``. A loss
    that is not finite is null. The speed is that of the median of the last 100 iterations; each token of a batch counts once, also where
    active recurrence learning uses it twice; it is null where nothing was trained.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._losses: dict[str, dict[str, float]] = {}  # by validation set
        self._speeds: deque[float] = deque(maxlen=100)  # tokens per second of the last iterations
        self.iteration = 0
        self.validation_set = ONE_SET

    def add_loss(self, pattern: str, loss: float) -> None:
        """Notes one pattern's loss on the current validation set and writes it all; one that is not finite is logged."""
        self._losses.setdefault(self.validation_set, {})[pattern] = loss
        if not _holds_losses():
            return
        if not math.isfinite(loss):
            on = f" on {self.validation_set}" if self.validation_set else ""
            print(f"rat-megatron: the validation loss{on} under {pattern} is {loss} at iteration {self.iteration}", flush=True)
        if self._folder is not None:
            self._write()

    def timed(self, train_step: Callable) -> Callable:
        """Wraps ``train_step`` so that its speed is noted. Megatron waits for the device at the end of each step."""

        def step(*args, **kwargs):
            tokens = get_current_running_global_batch_size() * get_args().seq_length
            start = time.perf_counter()
            result = train_step(*args, **kwargs)
            self._speeds.append(tokens / (time.perf_counter() - start))
            return result

        return step

    def _write(self) -> None:
        args = get_args()
        content = {
            "iteration": self.iteration,
            "consumed_samples": args.consumed_train_samples,
            "pattern": args.rat_pattern,
            "recurrence": args.rat_recurrence,
            **({"patterns": self._losses[ONE_SET]} if ONE_SET in self._losses else {"validation_sets": self._losses}),
            "tokens_per_second": statistics.median(self._speeds) if self._speeds else None,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / REPORT_NAME, content)


def a_line_an_interval(training_log: Callable) -> Callable:
    """Wraps Megatron's ``training_log``: its extra line after a start is no extra one where a log interval ends there."""

    def log(loss_dict, total_loss_dict, learning_rate, iteration, *args, is_first_iteration=False, **kwargs):
        is_extra = is_first_iteration and iteration % get_args().log_interval != 0
        return training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, is_first_iteration=is_extra, **kwargs)

    return log


def _holds_losses() -> bool:
    """One rank of those on the last pipeline stage, where the losses are."""
    return not torch.distributed.is_initialized() or (
        mpu.is_pipeline_last_stage()
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    )
