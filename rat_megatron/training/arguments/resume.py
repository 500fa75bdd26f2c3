"""Whether a run can start from the checkpoint it names: the same architecture, and to resume also the same data and schedule so far."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.hashes import iterations
from rat_megatron.checkpoint.torch_dist import ARCHITECTURE, find_iteration, read_checkpoint_args
from rat_megatron.data.loader.order import order_difference
from rat_megatron.errors import UserError
from rat_megatron.model.architecture import OPTIONS, ROTARY
from rat_megatron.training.arguments.layout import query_groups
from rat_megatron.training.arguments.optimizer import check_same_optimizer
from rat_megatron.training.arguments.schedule import Origin, check_batch_change, needs_no_override


def check_checkpoints(args: Namespace, derived: dict[str, Any]) -> None:
    """Raises UserError unless the checkpoint that the run starts from is there and fits; ``derived`` are defaults that args lack.

    Adds what follows: ``rat_resumed``, the iteration and the samples consumed where the run resumes, ``rat_branch``, what a run that writes
    to another folder resumes from, and which checkpoint and which schedule Megatron is to take.
    """
    derived |= {"ckpt_step": args.ckpt_step, "rat_resumed": None, "rat_branch": _branch(args), "rat_origin": None}
    if _holds_this_branch(args):
        derived |= {"load": args.save, "ckpt_step": None}
        args = Namespace(**vars(args) | {"load": args.save, "ckpt_step": None})
    _check_folders(args)
    resumed = derived["load"] if derived["load"] and _has_checkpoint(derived["load"]) else None
    source = resumed or args.pretrained_checkpoint
    if source is None:
        if args.ckpt_step is not None:
            raise UserError(f"--ckpt-step {args.ckpt_step} names an iteration, but there is no checkpoint to start from: leave it out")
        return
    if resumed and args.pretrained_checkpoint and args.ckpt_step:
        derived["ckpt_step"] = None  # it names an iteration of the pretrained checkpoint, which this run has left behind
    stored = read_checkpoint_args(Path(source), derived["ckpt_step"])
    derived["rat_origin"] = getattr(stored, "rat_origin", None)  # the model of another family that it was once
    there, here = _architecture(stored), _architecture(Namespace(**vars(args) | derived))
    for name, value in here.items():
        if there[name] != value:
            raise UserError(
                f"the checkpoint in {source} has {name} {there[name]}, this run asks for {value}: "
                "give the flags of the checkpoint, or another folder"
            )
    _check_rotary(stored, args, source, resumed is not None)
    if not resumed or args.finetune or args.skip_train:
        return
    if getattr(stored, "rat_averaged_iterations", None):
        raise UserError(
            f"{source} holds averaged weights and no optimizer to resume with: start from them with --pretrained-checkpoint {source} "
            "and a --save of its own"
        )
    _check_data_order(stored, derived["rat_data_order"], source, args.rat_allow_data_change)
    if not args.no_load_optim:
        check_same_optimizer(args, stored, source)
        derived["rat_spikes"] = getattr(stored, "rat_spikes", None)  # a new optimizer has no state to put back yet
    origin = _origin(args, stored, source, derived["ckpt_step"])
    if origin is None:
        return
    derived["rat_resumed"] = origin.iteration, origin.consumed
    if not (args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        check_batch_change(args, origin)
        derived["override_opt_param_scheduler"] = needs_no_override(args, origin)


def _origin(args: Namespace, stored: Namespace, source: str, step: int | None) -> Origin | None:
    """Where the run resumes; None where the checkpoint does not say, as a converted one."""
    name = find_iteration(Path(source), step).name.removeprefix("iter_")
    if not name.isdigit():
        return None
    numbers = [int(path.name.removeprefix("iter_")) for path in iterations(Path(source))]
    overwrites = bool(args.save) and _same(source, args.save) and max(numbers, default=0) > int(name)
    return Origin(source, int(name), getattr(stored, "consumed_train_samples", 0), stored, numbers, overwrites)


def _branch(args: Namespace) -> list | None:
    """What a run that does not write where it reads resumes from."""
    apart = args.load and args.save and not args.finetune and not args.skip_train and not _same(args.load, args.save)
    return [str(Path(args.load).resolve()), args.ckpt_step] if apart else None


def _holds_this_branch(args: Namespace) -> bool:
    """Whether --save has what a run with this --load and --ckpt-step wrote: started again, it goes on from there."""
    branch = _branch(args)
    return bool(branch) and _has_checkpoint(args.save) and getattr(read_checkpoint_args(Path(args.save)), "rat_branch", None) == branch


def _check_folders(args: Namespace) -> None:
    """Folders that are read hold a checkpoint, and one that is written holds none that the run would take for nothing and overwrite."""
    given = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint, "--save": args.save}
    for flag, folder in given.items():
        if folder and "://" in folder:
            raise UserError(
                f"{flag} {folder} is no folder: checkpoints are kept in a file system that all nodes share, give a folder in it"
            )
        if not folder or _has_checkpoint(folder):
            continue
        there = ", ".join(path.name for path in iterations(Path(folder)))
        if flag != "--save" and not (args.save and _same(folder, args.save)):
            raise UserError(
                f"{flag} {folder} holds no checkpoint (no {TRACKER_NAME}{f', which would name one of {there}' if there else ''})"
            )
        if there:
            raise UserError(
                f"--save {folder} holds {there} but no {TRACKER_NAME}, so that this run would begin anew and overwrite them: write the "
                "iteration to resume from into that file, or give another folder"
            )
    if args.load and args.save and not args.skip_train and not _same(args.load, args.save) and _has_checkpoint(args.save):
        raise UserError(
            f"--save {args.save} holds checkpoints already, which a run that starts from --load {args.load} would overwrite: leave out "
            "--load to resume from them, or give another folder"
        )


def _check_data_order(stored: Namespace, here: dict[str, Any], source: str, allowed: bool) -> None:
    """A run that resumes goes on with the next sample: same data, blend and seed, unless --rat-allow-data-change."""
    there = getattr(stored, "rat_data_order", None)
    if there is None:
        _say(f"the checkpoint in {source} does not say which data it was trained on: whether these are the same is not checked")
        return
    consumed = getattr(stored, "consumed_train_samples", 0)
    difference = order_difference(there, here, consumed)
    if difference and not allowed:
        raise UserError(
            f"the checkpoint in {source} was trained on samples in another order ({difference}): give its data, seed and blend, "
            "or --rat-allow-data-change to go on with these"
        )
    if difference:
        _say(f"--rat-allow-data-change: after {consumed} samples the data are others than in the checkpoint in {source} ({difference})")


def _check_rotary(stored: Namespace, args: Namespace, source: str, resumed: bool) -> None:
    """The angles of RoPE are the checkpoint's; a run that begins from its weights may have others, for longer sequences, and says so."""
    there, here = ({name: getattr(of, name, default) for name, default in ROTARY.items()} for of in (stored, args))
    changed = [f"{name} {there[name]} becomes {here[name]}" for name in ROTARY if there[name] != here[name]]
    if changed and resumed:
        raise UserError(f"the angles of RoPE are others than in the checkpoint in {source} ({', '.join(changed)}): give its flags")
    if changed:
        _say(f"the angles of RoPE are others than those that the weights in {source} were trained with: {', '.join(changed)}")


def _say(line: str) -> None:
    """One line in the log, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"rat-megatron: {line}", flush=True)


def _architecture(args: Namespace) -> dict[str, Any]:
    """What must be the same for a checkpoint's weights to fit; widths that were not given are those that Megatron will fill in."""
    options = {name: getattr(args, name, default) for name, default in OPTIONS.items()}
    if isinstance(every := options["no_rope_freq"], int):
        options["no_rope_freq"] = ([0] * (every - 1) + [1]) * (args.num_layers // every)  # as Megatron's configuration
    return (
        {name: getattr(args, name, None) for name in ARCHITECTURE}
        | options
        | {
            "kv_channels": args.kv_channels or args.hidden_size // args.num_attention_heads,
            "ffn_hidden_size": args.ffn_hidden_size or (int(8 * args.hidden_size / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size),
            "num_query_groups": query_groups(args),
        }
    )


def _same(folder: str, other: str) -> bool:
    return Path(folder).resolve() == Path(other).resolve()


def _has_checkpoint(folder: str) -> bool:
    return (Path(folder) / TRACKER_NAME).is_file()
