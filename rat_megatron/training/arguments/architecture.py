"""Refuses Megatron's flags that would give another model than RAT+, or that would change nothing (rat_megatron.model.architecture)."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from typing import Any

from rat_megatron.errors import UserError
from rat_megatron.model.architecture import SPEC, YARN, other_values, unused_flags


def check_architecture(args: Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UserError for the first flag that a RAT+ model does not have, or that this program has no use for.

    ``args`` as parsed, before Megatron completes them; ``parser`` is a parser of the same flags.
    """
    groups = {action.dest: group.title or "" for group in parser._action_groups for action in group._group_actions}
    options = [(action.dest, option) for action in parser._actions for option in action.option_strings]
    flags = dict(options) | {name: option for name, option in options if option in sys.argv}  # by the name that was typed
    for name, value, right in other_values(args):
        typed, instead = flags[name], ""
        if right is not None and not isinstance(right, bool):
            typed, instead = f"{typed} {value}", f", or give {right}"
        raise UserError(f"{typed} is not part of a RAT+ layer: leave it out{instead}")
    defaults = vars(parser.parse_args([]))
    for name, reason in unused_flags(args, groups, defaults):
        raise UserError(f"{flags[name]} {reason}" + ("" if ": " in reason else ": leave it out"))
    _check_options(args, flags, defaults)
    if args.transformer_impl not in ("local", "transformer_engine"):
        raise UserError(f"--transformer-impl {args.transformer_impl} cannot train: give transformer_engine or local")
    if args.spec not in (None, SPEC):
        raise UserError(
            f"--spec {' '.join(args.spec)} gives other layers than RAT+: leave it out, or train with Megatron's pretrain_gpt.py"
        )


def _check_options(args: Namespace, flags: dict[str, str], defaults: dict[str, Any]) -> None:
    """One way of scaling RoPE at a time, and no flag that another one would have to go with."""
    yarn = args.position_embedding_type == "yarn"
    scaled = [name for name in ("use_rope_scaling", "rotary_seq_len_interpolation_factor") if getattr(args, name)]
    if len(scaled) + yarn > 1:
        raise UserError(f"{flags[scaled[-1]]} cannot scale RoPE beside {'--position-embedding-type yarn' if yarn else flags[scaled[0]]}")
    of_yarn = next((name for name in YARN if getattr(args, name) != defaults[name]), None)
    if of_yarn and not yarn:
        raise UserError(f"{flags[of_yarn]} would change nothing without --position-embedding-type yarn: leave it out")
    if yarn and args.rotary_scaling_factor < 1:
        raise UserError(f"--rotary-scaling-factor {args.rotary_scaling_factor} would shorten the range of RoPE: give 1 or more")
    if args.rat_gate_bias and not args.rat_recurrence:
        raise UserError("--rat-gate-bias is for the layer with a recurrence, and --no-rat-recurrence leaves that out: leave out one")
    if args.rat_qk_layernorm_over_heads and not args.qk_layernorm:
        raise UserError("--rat-qk-layernorm-over-heads says how --qk-layernorm is computed: give that too")
