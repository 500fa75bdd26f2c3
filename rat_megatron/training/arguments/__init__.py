"""The command line of pretraining: every Megatron flag, the ``--rat-*`` ones, presets, and checks that end early.

Defaults come in layers, later ones winning: Megatron's, the RAT+ model's, the machine's, the preset's, what follows from the data,
the command line.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from megatron.training.arguments import parse_and_validate_args, parse_args

from rat_megatron.errors import UserError
from rat_megatron.training.arguments.checks import check_and_derive
from rat_megatron.training.arguments.flags import add_rat_args


def parse_arguments() -> Namespace:
    """Reads, completes and checks the command line, and sets Megatron's globals; raises UserError or PatternError."""
    try:
        given = parse_args(add_rat_args)
        return parse_and_validate_args(partial(add_rat_args, derived=check_and_derive(given)))
    except AssertionError as error:  # how Megatron refuses arguments
        raise UserError(str(error) or "Megatron refuses this combination of arguments") from error
