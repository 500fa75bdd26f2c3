"""FP8 on the command line: the two flags of FP8 attention, which Megatron has as settings only, and what fits neither GPU nor model.

The linear layers compute in FP8 under --fp8-format; so does dense attention with --fp8-dot-product-attention. The recurrence, the output
gate and sparse patterns stay in bf16. What is refused here would end in Transformer Engine (2.20), or stay in bf16 without a word.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from rat_megatron.errors import UserError
from rat_megatron.training.arguments.layout import query_groups

_HOPPER, _BLACKWELL = (9, 0), (10, 0)
# Recipes of attention by the name in NVTE_DPA_FP8_RECIPE, with which Transformer Engine lets attention have one of its own.
_ATTENTION_RECIPES = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "mxfp8": "MXFP8BlockScaling"}


def add_fp8_args(group: argparse._ArgumentGroup) -> None:
    """Under the names of Megatron's settings, so that they reach its configuration."""
    group.add_argument(
        "--fp8-dot-product-attention",
        action="store_true",
        help="Dense attention in FP8; needs --fp8-format, and on Hopper --fp8-recipe delayed. Sparse patterns stay in bf16.",
    )
    group.add_argument(
        "--fp8-multi-head-attention",
        action="store_true",
        help="Implies --fp8-dot-product-attention and adds nothing: attention takes and gives bf16, for RAT+'s recurrence and gate.",
    )


def check_fp8(args: Namespace) -> None:
    """Raises UserError, naming the flag and the remedy, for FP8 that this machine or model cannot have."""
    cuda = torch.cuda.is_available()
    if (args.fp8 or args.fp4) and not (cuda and HAVE_TE):
        raise UserError("--fp8-format and --fp4-format need a GPU with Transformer Engine: leave them out on this machine")
    attention = next((flag for flag in ("multi_head_attention", "dot_product_attention") if getattr(args, f"fp8_{flag}")), None)
    if attention and not args.fp8:
        raise UserError(f"--fp8-{attention.replace('_', '-')} needs FP8 layers around it: give --fp8-format hybrid, or leave it out")
    if not args.fp8:
        return
    if args.transformer_impl == "local":
        raise UserError("--fp8-format needs Transformer Engine's layers: leave out --transformer-impl local")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9) or (args.fp8_recipe == "mxfp8" and capability < _BLACKWELL):
        remedy = "give --fp8-recipe delayed, tensorwise or blockwise" if capability >= (8, 9) else "leave out --fp8-format"
        raise UserError(f"--fp8-recipe {args.fp8_recipe} needs a newer GPU than one of compute capability {_dotted(capability)}: {remedy}")
    _check_widths(args)
    if attention:
        _check_attention(f"--fp8-{attention.replace('_', '-')}", args.fp8_recipe, capability)


def _check_attention(flag: str, recipe: str, capability: tuple[int, int]) -> None:
    """On Hopper, cuDNN's attention knows delayed scaling only. Under the other recipes Megatron does not pass the wish for FP8 on."""
    if capability < _HOPPER:
        raise UserError(f"{flag} needs a GPU of compute capability 9.0, this one has {_dotted(capability)}: leave it out")
    if recipe not in _ATTENTION_RECIPES:
        raise UserError(f"{flag} does not reach attention with --fp8-recipe {recipe}: give --fp8-recipe delayed, or leave it out")
    delayed = _ATTENTION_RECIPES["delayed"]
    chosen = os.environ.get("NVTE_DPA_FP8_RECIPE") or _ATTENTION_RECIPES[recipe]
    if chosen != delayed and (capability < _BLACKWELL or chosen not in _ATTENTION_RECIPES.values()):
        raise UserError(
            f"{flag} works on this GPU with delayed scaling only, not with {chosen}: give --fp8-recipe delayed, or export "
            f"NVTE_DPA_FP8_RECIPE={delayed} to have it in attention alone"
        )


def _check_widths(args: Namespace) -> None:
    """FP8 matrix products take widths that are multiples of 16, and a multiple of 8 tokens at a time."""
    tp = args.tensor_model_parallel_size
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    projections = 2 * args.num_attention_heads + (3 if args.rat_recurrence else 2) * query_groups(args)
    widths = {
        "--hidden-size": args.hidden_size,
        "--ffn-hidden-size of a tensor-parallel rank": (args.ffn_hidden_size or 4 * args.hidden_size) // tp,
        "width of attention (heads of a tensor-parallel rank x --kv-channels)": args.num_attention_heads // tp * head,
        "width of the fused projection of a tensor-parallel rank": projections // tp * head,
    }
    for name, width in widths.items():
        if width % 16:
            raise UserError(f"--fp8-format needs widths that are multiples of 16, and the {name} is {width}: change it, or stay in bf16")
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size // (tp if args.sequence_parallel else 1)
    if tokens % 8:
        raise UserError(
            f"--fp8-format needs a multiple of 8 tokens on a rank, and --micro-batch-size {args.micro_batch_size} with "
            f"--seq-length {args.seq_length} gives {tokens}: change one of them"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
