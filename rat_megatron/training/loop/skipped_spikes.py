"""--rat-skip-spikes: an iteration with a loss or gradient norm far above its running mean leaves no trace but its samples, which are past.

Under active recurrence learning the sparse step has updated by the time the dense step's loss is known, and both are undone together. As
in PaLM (arXiv 2204.02311), where batches around a spike were left out by hand, training goes on with the next batch.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from rat_megatron.errors import RunFailed
from rat_megatron.training.loop.snapshot import Snapshot
from rat_megatron.training.monitoring.loss_spikes import FOLDER_NAME, Track, note_batch

_MOST_IN_A_ROW = 10


def skipping_spikes(train_step: Callable[..., tuple], args: Namespace, names: list[str]) -> Callable[..., tuple]:
    """Wraps the ``train_step`` of a whole iteration; ``names`` are those of its losses and gradient norms in what it returns.

    Far is --rat-skip-spikes standard deviations of the last fifty iterations or so that were kept; what is not finite always is.
    ``args.rat_spikes`` has what that is compared with, {name: [seen, mean, variance]}, and how many iterations were left out in a row, so
    that checkpoints keep it. Raises RunFailed, on every rank, after ten in a row, or where an iteration cannot be undone.
    """
    snapshot = Snapshot()

    def step(
        forward_step_func: Callable, data_iterator: Any, model: list, optimizer: Any, opt_param_scheduler: Any, *rest: Any, **kwargs: Any
    ) -> tuple:
        snapshot.take(model, optimizer)
        held = _HeldScheduler()
        result = train_step(forward_step_func, data_iterator, model, optimizer, held, *rest, **kwargs)
        losses, skipped, should_checkpoint, should_exit, exit_code, grad_norm, *others = result
        if should_exit:
            return result
        values = _agreed({**losses, "grad norm": grad_norm}, names)
        before = args.rat_spikes or {"tracks": {}, "in_a_row": 0}
        tracks = {name: Track(*before["tracks"].get(name, ())) for name in names}
        far = next((name for name, value in values.items() if _is_far(tracks[name], value, args.rat_skip_spikes)), None)
        if far is None:
            for name, value in values.items():
                tracks[name].add(value)
            args.rat_spikes = {"tracks": {name: track.state() for name, track in tracks.items()}, "in_a_row": 0}
            for increment in held.increments:
                opt_param_scheduler.step(increment=increment)
            return result

        if losses:  # where they are, on the last pipeline stage
            _note(far, values[far], tracks[far], args.curr_iteration + 1, data_iterator)
        if not snapshot.put_back(model, optimizer):
            raise RunFailed(
                f"iteration {args.curr_iteration + 1} has a {far} of {values[far]:.4g} and cannot be left out, as the optimizer's state "
                "began with it: lower --lr, or look at its samples in suspicious_samples/ beside the checkpoints"
            )
        args.rat_spikes = before | {"in_a_row": before["in_a_row"] + 1}
        if args.rat_spikes["in_a_row"] >= _MOST_IN_A_ROW:
            raise RunFailed(
                f"the last {_MOST_IN_A_ROW} iterations, up to {args.curr_iteration + 1}, were left out by --rat-skip-spikes: look at their "
                f"samples in {FOLDER_NAME}/ beside the checkpoints, or resume with a larger --rat-skip-spikes"
            )
        args.skipped_train_samples += get_current_global_batch_size()
        return losses, 1, should_checkpoint, should_exit, exit_code, grad_norm, *others

    return step


class _HeldScheduler:
    """Stands in for the learning-rate scheduler, which only iterations that are kept move on."""

    def __init__(self):
        self.increments: list[int] = []

    def step(self, increment: int) -> None:
        self.increments.append(increment)


def _agreed(found: dict[str, Any], names: list[str]) -> dict[str, float]:
    """The values of these names on the last rank, where Megatron has them all, for every rank. 0 where none is, as without parameters."""
    values = [float(found[name]) if found.get(name) is not None else 0.0 for name in names]
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
    torch.distributed.broadcast(tensor, src=torch.distributed.get_world_size() - 1)
    return dict(zip(names, tensor.tolist(), strict=True))


def _is_far(track: Track, value: float, deviations: float) -> bool:
    return not math.isfinite(value) or track.is_far(value, deviations)


def _note(name: str, value: float, track: Track, iteration: int, data_iterator: Any) -> None:
    facts: dict[str, float | str] = {"value": value if math.isfinite(value) else str(value)}
    facts |= {"running_mean": track.mean, "standard_deviation": math.sqrt(track.variance)}
    if note_batch("skipped", name, iteration, data_iterator, **facts):
        usual = f"{track.mean:.4f} +- {math.sqrt(track.variance):.4f}"
        print(f"rat-megatron: iteration {iteration} is left out: its {name} is {value:.4f}, where {usual} is usual", flush=True)
