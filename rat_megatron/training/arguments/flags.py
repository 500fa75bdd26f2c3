"""The ``--rat-*`` flags, presets, and the defaults of Megatron's flags that the model, the checkpoints and this machine ask for."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from rat_megatron.errors import UserError
from rat_megatron.training.arguments import presets
from rat_megatron.training.arguments.fp8 import add_fp8_args
from rat_megatron.training.arguments.pretrained import architecture_of

_INTERVALS: dict[str, Any] = {"eval_interval": 1000, "save_interval": 1000}  # Megatron has none, and fails without
_CHECKPOINTING: dict[str, Any] = {
    "ckpt_format": "torch_dist",
    "dist_ckpt_optim_fully_reshardable": True,  # Megatron's own default cannot resume the optimizer at another TP or PP
    "dist_ckpt_strictness": "log_unexpected",  # of what a checkpoint lacks; patches/ let it be FP8's state alone
}
_DATA: dict[str, Any] = {
    "dataloader_type": "external",
    "tokenizer_type": "NullTokenizer",  # the data are tokens already
    "split": "1",  # unused: a stream carries its own validation split
}


def add_rat_args(parser: argparse.ArgumentParser, derived: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="rat")
    group.add_argument("--rat-pattern", default="dense", help="Attention pattern to train: dense, d16, d16w256s4, [dense,d64]*12, ...")
    group.add_argument(
        "--rat-arl-pattern",
        help="Pattern of the sparse step of active recurrence learning, or 'none'. Default: d64, and none with --pretrained-checkpoint.",
    )
    group.add_argument(
        "--no-rat-recurrence", action="store_false", dest="rat_recurrence", help="Train the plain-attention baseline: no recurrence."
    )
    group.add_argument(
        "--no-rat-output-gate",
        action="store_false",
        dest="attention_output_gate",
        help="No gate for attention's output.",
    )
    group.add_argument(
        "--rat-gate-bias", action="store_true", help="Forget and output gate have a bias, where --add-qkv-bias gives one to q, k and v too."
    )
    group.add_argument("--rat-qk-layernorm-over-heads", action="store_true", help="--qk-layernorm is over all heads at once, as in OLMo2.")
    group.add_argument("--rat-norm-after", action="store_true", help="Norms stand behind attention and MLP, as in OLMo2, and not before.")
    group.add_argument("--rat-eval-patterns", nargs="+", help="Patterns whose validation loss is reported. Default: --rat-pattern.")
    group.add_argument(
        "--rat-data-cache-limit",
        type=_size,
        help="Size that shards of remote streams may take in --data-cache-path on each node: 500gb, 2tb, ... Default: all of them stay.",
    )
    group.add_argument(
        "--rat-allow-data-change",
        action="store_true",
        help="Resume also where --data-path, --seed or the blend give other samples than the checkpoint's run had before it.",
    )
    group.add_argument(
        "--rat-preset",
        choices=[*presets.PRETRAIN, *presets.RETROFIT],
        help="Fills every flag that is not given with the paper's recipe for a model of this size, or with one for a retrofitted model, "
        "whose size is that of --pretrained-checkpoint.",
    )
    group.add_argument(
        "--rat-hang-timeout-in-mins",
        type=float,
        help="Without progress for so long, every rank shows its stack and the run ends. Default: it waits.",
    )
    group.add_argument(
        "--rat-keep-checkpoints",
        type=_positive,
        help="Keep this many of the last checkpoints, every --save-retain-interval-th, and those that other runs start from. Default: all.",
    )
    group.add_argument(
        "--no-async-save", action="store_false", dest="async_save", help="Training waits until a checkpoint is written, as on a CPU."
    )
    group.add_argument(
        "--rat-skip-spikes",
        type=float,
        help="Leave out every iteration whose loss or gradient norm lies so many standard deviations above its running mean, or is not "
        "finite: weights and optimizer stay as they were. 6 is rare. Default: none is left out, and what is not finite ends the run.",
    )
    add_fp8_args(group)

    parser.error = _refuse  # type: ignore[method-assign, assignment]
    parser.set_defaults(**presets.MODEL, **_INTERVALS, **_CHECKPOINTING, **_DATA, **_platform_defaults())
    recipe = _recipe(preset) if (preset := given("--rat-preset")) else {}
    parser.set_defaults(rat_architecture_from=None)
    if (source := given("--pretrained-checkpoint")) and not given("--num-layers") and "num_layers" not in recipe:
        parser.set_defaults(**architecture_of(source, given("--ckpt-step")))
    parser.set_defaults(**recipe | (derived or {}))
    _let_help_print(parser)
    return parser


def _recipe(preset: str) -> dict[str, Any]:
    """A preset's values, but for those that would stand against what was typed: Megatron takes a schedule in iterations or in samples, and
    a warmup as one of these or a fraction."""
    recipe = dict(((presets.ADAPT if given("--pretrained-checkpoint") else presets.PRETRAIN) | presets.RETROFIT).get(preset, {}))
    if not recipe:  # the parser will say so
        return recipe
    style = given("--lr-decay-style")
    if style == "WSD":
        recipe |= presets.wsd_decay(_typed_length(recipe["global_batch_size"]) or recipe["train_iters"])
    if style in ("WSD", "constant"):
        recipe = presets.with_fixed_warmup(recipe)
    if any(map(given, ("--train-samples", "--rampup-batch-size", "--step-batch-size-schedule"))):
        recipe = presets.in_samples(recipe)
    if warmup := [name for name in ("fraction", "iters", "samples") if given(f"--lr-warmup-{name}")]:
        for name in {"fraction", "iters", "samples"} - set(warmup):
            recipe.pop(f"lr_warmup_{name}", None)
    if given("--optimizer") == "muon":
        recipe |= presets.MUON
    return recipe


def _typed_length(batch: int) -> int | None:
    """Iterations of a run by the flags typed, with samples in batches of the preset's size."""
    iterations, samples = given("--train-iters") or "", given("--train-samples") or ""
    return int(iterations) if iterations.isdigit() else int(samples) // batch if samples.isdigit() else None


def _let_help_print(parser: argparse.ArgumentParser) -> None:
    """Some help of Megatron's has a plain percent sign, on which argparse stumbles: --help would end in a traceback."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (TypeError, ValueError, KeyError):
            action.help = action.help.replace("%", "%%")


def _size(word: str) -> int:
    """A number of bytes with its unit."""
    from streaming.base.util import bytes_to_int  # here because it takes seconds, and --help should not

    try:
        return bytes_to_int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{word}' is no size: write 500gb, 2tb, ...") from None


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"'{word}' is no number of checkpoints: give 1 or more, or leave it out to keep all")
    return int(word)


def _refuse(message: str) -> None:
    raise UserError(message)


def given(flag: str) -> str | None:
    """The value of a flag as typed, before parsing; the last one counts, as everywhere. None when it was not."""
    value = None
    for index, word in enumerate(sys.argv[1:], start=1):
        if word == flag and index + 1 < len(sys.argv):
            value = sys.argv[index + 1]
        if word.startswith(flag + "="):
            value = word.split("=", 1)[1]
    return value


def _platform_defaults() -> dict[str, Any]:
    """What this machine can do: Transformer Engine on a GPU that has it, Megatron's local layers elsewhere."""
    cuda = torch.cuda.is_available()
    apex = find_spec("fused_weight_gradient_mlp_cuda") is not None
    # Saving in the background is a process more for each rank, which on a CPU takes longer to start than the tiny models take to save.
    defaults: dict[str, Any] = {"gradient_accumulation_fusion": cuda and (HAVE_TE or apex), "async_save": cuda}
    if not (cuda and HAVE_TE):
        defaults |= {
            "transformer_impl": "local",
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "no_persist_layer_norm": True,
        }
    if not cuda:
        defaults |= {"distributed_backend": "gloo", "bias_dropout_fusion": False}
    return defaults
