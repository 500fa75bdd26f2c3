"""Which samples a NaN or a jump of the loss came from, kept in ``suspicious_samples/`` beside the checkpoints."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training.global_vars import get_args

from rat_megatron.files import write_json
from rat_megatron.training.loop.arl import unwrap_iterators

FOLDER_NAME = "suspicious_samples"
_DECAY = 0.98  # of the running mean and variance: the last fifty iterations or so
_DEVIATIONS = 6.0
_WARM_UP = 50  # iterations before a jump can be told


def is_nan_noted(sample_ids: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """A test for NaN, to validate the loss of a microbatch with, that notes its samples; sample_ids [b] as the streams count them."""

    def is_nan(loss: torch.Tensor) -> bool:
        nan = bool(torch.isnan(loss).any())
        if nan:
            iteration = get_args().curr_iteration + 1
            _note(_nan_note(iteration), iteration, "NaN", sample_ids.tolist())
        return nan

    return is_nan


def withdraw_notes(args: Namespace) -> None:
    """Takes back what this rank noted of a NaN in this iteration: the weights were to blame."""
    if args.save:
        (Path(args.save) / FOLDER_NAME / f"{_nan_note(args.curr_iteration + 1)}.json").unlink(missing_ok=True)


def noting_spikes(train_step: Callable) -> Callable:
    """Wraps Megatron's ``train_step``: a loss far above its running mean is logged and noted, with the samples of the whole batch.

    Far is six standard deviations of the last fifty iterations or so. Under a CUDA graph, where no microbatch can be checked, a loss or
    gradient norm that is not finite is noted the same way and ends the run with a RuntimeError, before its update can be saved.
    Megatron has read the gradient norm from the device by then, so reading the losses costs no further wait.
    """
    tracks: dict[str, Track] = {}

    def step(forward_step_func: Callable, data_iterator: Any, *args: Any, **kwargs: Any) -> tuple:
        result = train_step(forward_step_func, data_iterator, *args, **kwargs)
        if get_args().rat_skip_spikes and result[1]:
            return result  # left out, and noted, by loop/skipped_spikes.py
        if get_args().cuda_graph_impl == "full_iteration" and result[0]:
            _end_unless_finite({**result[0], "grad norm": result[5]}, data_iterator)
        for name, loss in (result[0] or {}).items():  # on the last pipeline stage, where the losses are; alike on all its ranks
            if "loss" not in name:
                continue
            loss, iteration = float(loss), get_args().curr_iteration + 1
            if (mean := tracks.setdefault(name, Track()).jumped_from(loss)) is not None:
                facts = {"loss": loss if math.isfinite(loss) else str(loss), "running_mean": mean}
                if note_batch("jump", name, iteration, data_iterator, **facts):
                    print(f"rat-megatron: {name} jumped from {mean:.4f} to {loss:.4f} at iteration {iteration}", flush=True)
        return result

    return step


def _nan_note(iteration: int) -> str:
    return f"iteration-{iteration:07d}-nan-rank{torch.distributed.get_rank():05d}"


def _end_unless_finite(values: dict[str, Any], data_iterator: Any) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):  # None: no parameters on this rank
            iteration = get_args().curr_iteration + 1
            note_batch("nan", name, iteration, data_iterator)
            raise RuntimeError(f"found {float(value)} in {name} of iteration {iteration}: see {FOLDER_NAME}/ beside the checkpoints")


def note_batch(kind: str, name: str, iteration: int, data_iterator: Any, **facts: float | str) -> bool:
    """Notes the samples of the whole global batch; returns whether this is the one rank of the last stage that wrote them."""
    ids = [number for it in unwrap_iterators(data_iterator)[:1] for number in it.sample_ids()]
    every: list = [None] * mpu.get_data_parallel_world_size()
    torch.distributed.all_gather_object(every, ids, group=mpu.get_data_parallel_group())
    first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    if first:
        file_name = f"iteration-{iteration:07d}-{kind}-{name.replace(' ', '-')}"
        _note(file_name, iteration, f"{kind} of {name}", sum(every, []), **facts)
    return first


class Track:
    """Running mean and variance of one number of every iteration, of the last fifty or so."""

    def __init__(self, seen: int = 0, mean: float = 0.0, variance: float = 0.0):
        self.seen, self.mean, self.variance = seen, mean, variance

    def state(self) -> list[float]:
        """What a Track is made of again."""
        return [self.seen, self.mean, self.variance]

    def is_far(self, value: float, deviations: float) -> bool:
        """Whether ``value`` lies that many standard deviations above the mean; never before there are enough to tell."""
        return self.seen >= _WARM_UP and value - self.mean > deviations * math.sqrt(self.variance)

    def add(self, value: float) -> None:
        weight, deviation = max(1 - _DECAY, 1 / (self.seen + 1)), value - self.mean
        self.seen += 1
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation**2)

    def jumped_from(self, loss: float) -> float | None:
        """The running mean, if ``loss`` lies far above it, as infinity does. What is not finite changes nothing."""
        far, mean = self.is_far(loss, _DEVIATIONS), self.mean
        if math.isfinite(loss):  # one jump must not hide the next
            self.add(min(loss, mean + _DEVIATIONS * math.sqrt(self.variance)) if far else loss)
        return mean if far else None


def _note(name: str, iteration: int, reason: str, sample_ids: list[int], **facts: float | str) -> None:
    args = get_args()
    if not args.save:
        return
    folder = Path(args.save) / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    split = "train" if torch.is_grad_enabled() else "val"
    content = {"iteration": iteration, "reason": reason, **facts, "data_path": args.data_path, "split": split}
    content["sample_ids"] = sorted(sample_ids)
    write_json(folder / f"{name}.json", content)
