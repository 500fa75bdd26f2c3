"""The learning rate and weight decay over a run, and whether a resumed run may have another end than its checkpoint's run had.

Megatron counts both in samples, insists on the checkpoint's values, and takes others with --override-opt-param-scheduler only. That flag
is not needed where it changes no rate of the past and none of the next iterations: a constant rate, and the stable phase of a
warmup-stable-decay schedule, know nothing of how long the run will be.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from rat_megatron.errors import UserError
from rat_megatron.training.arguments.batch_size import batch_steps

_LENGTH, _DECAY, _WARMUP, _WSD_DECAY, _WSD_STYLE = "length", "decay", "warmup", "WSD decay", "--lr-wsd-decay-style"
_ENDS = {_LENGTH, _DECAY, _WSD_DECAY, _WSD_STYLE}  # what says how a run ends


@dataclass(frozen=True)
class Origin:
    """Where a run resumes: the checkpoint's folder, its iteration and the samples consumed, and its arguments; the iterations to choose
    from, and whether ``--save`` has later ones, which would be overwritten."""

    folder: str
    iteration: int
    consumed: int
    args: Namespace
    iterations: list[int]
    would_overwrite: bool


def check_complete_schedule(args: Namespace) -> None:
    """Raises UserError unless the flags of the schedule count alike, iterations or samples, and the phases of WSD fit the run."""
    if args.train_iters and args.train_samples:
        raise UserError("--train-iters and --train-samples both say how long the run is: give one of them")
    unit, other = ("samples", "iters") if args.train_samples else ("iters", "samples")
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if getattr(args, f"{name}_{other}"):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}-{other} does not count as --train-{unit} does: give {flag}-{unit}")
    length, warmup, wsd = (getattr(args, f"{name}_{unit}") for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"))
    length = length or getattr(args, f"train_{unit}")
    if warmup >= length:
        what = "iterations" if unit == "iters" else "samples"
        raise UserError(f"--lr-warmup-{unit} {warmup} must be below the {length} {what} of the decay")
    if args.lr_decay_style == "WSD":
        warmup = warmup if args.lr_warmup_fraction is None else args.lr_warmup_fraction * length
        if not wsd or wsd < 0:
            raise UserError(f"--lr-decay-style WSD decays over the last part of the run: give --lr-wsd-decay-{unit}, or a --rat-preset")
        if wsd + warmup > length:
            raise UserError(
                f"--lr-wsd-decay-{unit} {wsd} and a warmup of {warmup:g} are more than the run of {length}: lower one, or let it be longer"
            )


def needs_no_override(args: Namespace, origin: Origin) -> bool:
    """Whether the schedule of a run that resumes differs from its checkpoint's in how it ends only, which concerns no iteration so far.

    False where nothing differs. Raises UserError where a rate of the past or of the next iterations would change.
    """
    there, here = _schedule(origin.args), _schedule(args)
    differing = [name for name, value in here.items() if value is not None and there.get(name) not in (None, value)]
    if not differing:
        return False
    constant_decay = here["--start-weight-decay"] == here["--end-weight-decay"]
    style = args.lr_decay_style
    changes = set(differing) - ({_LENGTH} if style not in ("constant", "WSD") else _ENDS)
    if changes or not constant_decay:
        raise UserError(_refusal(differing, there, here, args, origin))
    if style == "WSD":
        _check_stable_phase(there, here, args, origin)
    return True


def check_batch_change(args: Namespace, origin: Origin) -> None:
    """Raises UserError where --train-iters would end a run at other samples than it says, as its batch was another before."""
    if args.train_samples:
        return
    batch = batch_steps(args)[0][1]
    if origin.consumed != origin.iteration * batch:
        samples = getattr(origin.args, "train_samples", None) or origin.args.train_iters * origin.args.global_batch_size
        raise UserError(
            f"the checkpoint in {origin.folder} has consumed {origin.consumed} samples in {origin.iteration} iterations, not of "
            f"--global-batch-size {batch}: with another batch, give --train-samples {samples} in place of --train-iters (and other flags "
            "that count iterations of the learning rate in samples)"
        )


def _schedule(args: Namespace) -> dict[str, Any]:
    """What fixes the rates of every iteration, lengths in samples; None where Megatron will fill it in."""
    plain = ["lr", "min_lr", "lr_warmup_init", "lr_decay_style"]
    schedule = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in plain}
    decay, style = getattr(args, "weight_decay", None), getattr(args, "weight_decay_incr_style", "constant")
    start, end = (decay, decay) if style == "constant" else (args.start_weight_decay, args.end_weight_decay)
    schedule |= {"--weight-decay": decay, "--weight-decay-incr-style": style, "--start-weight-decay": start, "--end-weight-decay": end}
    if getattr(args, "train_samples", None):
        unit, batch = "samples", 1
    else:
        unit, batch = "iters", batch_steps(args)[0][1]
    length, decay, warmup, wsd = (
        (getattr(args, f"{name}_{unit}", None) or 0) * batch for name in ("train", "lr_decay", "lr_warmup", "lr_wsd_decay")
    )
    decay = decay or length
    fraction = getattr(args, "lr_warmup_fraction", None)
    schedule |= {_LENGTH: length, _DECAY: decay, _WARMUP: warmup if fraction is None else fraction * decay}
    if schedule["--lr-decay-style"] == "WSD":
        schedule |= {_WSD_DECAY: wsd, _WSD_STYLE: args.lr_wsd_decay_style}
    return schedule


def _refusal(differing: list[str], there: dict[str, Any], here: dict[str, Any], args: Namespace, origin: Origin) -> str:
    named = {
        _LENGTH: "--train-samples" if args.train_samples else "--train-iters times --global-batch-size",
        _DECAY: "--lr-decay-samples" if args.train_samples else "--lr-decay-iters times --global-batch-size",
        _WSD_DECAY: "a WSD decay in samples of",
        _WARMUP: "a warmup in samples of",
    }
    style = here["--lr-decay-style"]
    name = differing[0]
    if style in ("constant", "WSD") and _WARMUP in differing and set(differing) <= _ENDS | {_WARMUP}:
        name = _WARMUP  # the rest could be otherwise
    hint = ""
    if name == _WARMUP and args.lr_warmup_fraction is not None:
        unit, batch = ("samples", 1) if args.train_samples else ("iters", batch_steps(args)[0][1])
        if there[_WARMUP] % batch == 0:
            hint = f" (--lr-warmup-{unit} {there[_WARMUP] / batch:g})"
    return (
        f"the checkpoint in {origin.folder} was trained with {named.get(name, name)} {there[name]}, this run asks for {here[name]}: give "
        f"the checkpoint's{hint}, or --override-opt-param-scheduler for the schedule of this run, or --use-checkpoint-opt-param-scheduler "
        "for the checkpoint's"
    )


def _check_stable_phase(there: dict[str, Any], here: dict[str, Any], args: Namespace, origin: Origin) -> None:
    """With WSD, the checkpoint must lie before the decay of its own run and before that of this one."""
    begun, begins = (schedule[_DECAY] - schedule[_WSD_DECAY] for schedule in (there, here))
    if origin.consumed > begun:
        iteration = origin.iteration - -(-(origin.consumed - begun) // batch_steps(origin.args)[-1][1])
        before = [number for number in origin.iterations if number <= iteration]
        choice = f"one of {', '.join(map(str, before))}" if before else "none of those that are there"
        raise UserError(
            f"iteration {origin.iteration} in {origin.folder} lies in the decay of its run, which began after iteration {iteration}: "
            f"another end can follow an iteration up to there, by --ckpt-step ({choice}), or give --override-opt-param-scheduler"
        )
    if origin.consumed > begins:
        unit, batch = ("samples", 1) if args.train_samples else ("iters", batch_steps(args)[0][1])
        left = (here[_DECAY] - origin.consumed) // batch
        wanted = here[_WSD_DECAY] // batch
        end = (origin.consumed + here[_WSD_DECAY]) // batch
        raise UserError(
            f"--lr-wsd-decay-{unit} {wanted} is more than the {max(left, 0)} that are left after iteration {origin.iteration} in "
            f"{origin.folder}: give --train-{unit} {end}, or a shorter decay"
        )
    if origin.would_overwrite:
        raise UserError(
            f"--save {args.save} is the run that this one branches from at iteration {origin.iteration}, and its later iterations would be "
            "overwritten: give another folder by --save, and this one by --load"
        )
