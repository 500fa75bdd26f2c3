"""How a run ends after a step whose loss or gradient is NaN: with a whole iteration on the disk, and a sentence that says the way out.

Megatron's rerun state machine computes such a step again and ends the run with exit code 16 (the same result: another device could tell
whose fault it is) or 17 (another result: this device's). It would save for that, with its own state in the checkpoint, and every run
that resumed would end in its first step, whatever that gave.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import EXIT_CODE_RESUME_TO_DISAMBIGUATE, RerunState, get_rerun_state_machine

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.torch_dist import latest_iteration
from rat_megatron.training.monitoring.loss_spikes import FOLDER_NAME, withdraw_notes
from rat_megatron.training.monitoring.weights import all_finite, here_finite


def ending_whole(train_step: Callable[..., tuple], args: Namespace) -> Callable[..., tuple]:
    """Wraps the ``train_step`` of a whole iteration: where it ends the run, a resumed run goes on from what is then on the disk.

    A checkpoint that the step asks for is of the iteration before; it is left out where the weights are not finite, and then no samples
    are blamed.
    """

    def step(forward_step_func: Callable, data_iterator: Any, model: list, *rest: Any, **kwargs: Any) -> tuple:
        machine = get_rerun_state_machine()
        machine.first_iteration_complete = True  # Megatron lets the first iteration pass, as it could not save before it
        try:
            result = train_step(forward_step_func, data_iterator, model, *rest, **kwargs)
        except RuntimeError:  # --rerun-mode disabled; other ranks may not come here
            if not here_finite(model):
                withdraw_notes(args)
            raise
        losses, skipped, should_checkpoint, should_exit, exit_code, *others = result
        if not should_exit:
            return result
        machine.state = RerunState.NOT_RUNNING_YET  # in a checkpoint, it would end every run that resumes
        finite = all_finite(model)
        if not finite:
            withdraw_notes(args)
        should_checkpoint = should_checkpoint and finite and args.curr_iteration > 0
        if torch.distributed.get_rank() == 0:
            print(f"rat-megatron: {_explanation(args, exit_code, finite, should_checkpoint)}", flush=True)
        return losses, skipped, should_checkpoint, should_exit, exit_code, *others

    return step


def _explanation(args: Namespace, exit_code: int, finite: bool, saves: bool) -> str:
    iteration = args.curr_iteration
    latest = f"iteration {iteration}" if saves and args.save else _latest(args.save)
    text = f"iteration {iteration + 1} gave a loss or gradient that is not finite (exit code {exit_code}); on the disk is {latest}, whole. "
    if not finite:
        return text + (
            "The weights themselves are not finite, so that no sample is to blame: where the run ends here again, write the number of an "
            f"iteration before into {TRACKER_NAME}"
        )
    if exit_code == EXIT_CODE_RESUME_TO_DISAMBIGUATE:
        return text + (
            f"Computed again here, the result was the same: its samples are in {FOLDER_NAME}/ beside the checkpoints. Start the run again, "
            "on another device if you can: if it passes, this device was at fault; if it ends here again, lower --lr or --clip-grad, or "
            f"leave this iteration out with --iterations-to-skip {iteration + 1}, or all such with --rat-skip-spikes"
        )
    return text + "Computed again here, the result was another: this device may be at fault, so start the run again without it"


def _latest(save: str | None) -> str:
    found = latest_iteration(Path(save)) if save else None
    return "no checkpoint" if found is None else f"iteration {found}"
