"""The command line of pretraining: Megatron's flags but those of other models, the ``--rat-*`` ones, presets, and checks that end early.

Defaults come in layers, later ones winning: Megatron's, the RAT+ model's, the machine's, the preset's, what follows from the data,
the command line.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial

from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from rat_megatron.errors import UserError
from rat_megatron.training.arguments.architecture import check_architecture
from rat_megatron.training.arguments.checks import check_and_derive
from rat_megatron.training.arguments.flags import add_rat_args, given

REPLACED = ("rat_pattern", "rat_arl_pattern", "rat_eval_patterns", "data_path", "eval_iters", "load", "ckpt_step")
"""Arguments that are what ``check_and_derive`` says, also where something else was typed."""


def parse_arguments() -> Namespace:
    """Reads, completes and checks the command line, and sets Megatron's globals; raises UserError or PatternError."""
    try:
        derived = check_and_derive(read_command_line())
        replaced = {name: derived.pop(name) for name in REPLACED}
        args = parse_args(partial(add_rat_args, derived=derived))
        if args.step_batch_size_schedule:  # Megatron refuses a batch size beside it, and takes the smallest where there is none
            args._is_global_batch_size_explicitly_specified = False
        validate_args(args, {})
        set_global_variables(args)
    except AssertionError as error:  # how Megatron refuses arguments
        raise UserError(str(error) or "Megatron refuses this combination of arguments") from error
    vars(args).update(replaced, full_validation=False, multiple_validation_sets=False, validation_set_names=None)
    return args


def read_command_line() -> Namespace:
    """The arguments as given, of a RAT+ model and no other; raises UserError."""
    if given("--yaml-cfg"):  # Megatron would take it in place of the command line
        raise UserError("--yaml-cfg is not supported: give the flags on the command line")
    args = parse_args(add_rat_args)
    check_architecture(args, flags_of_this_program())
    return args


def flags_of_this_program() -> ArgumentParser:
    """A parser of Megatron's flags and ours, with the defaults that hold here."""
    return add_rat_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
