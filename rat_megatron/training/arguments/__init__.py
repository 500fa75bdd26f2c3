"""The command line of pretrain_rat.py: every Megatron flag, the ``--rat-*`` ones, presets, and checks that end early.

Defaults come in layers, later ones winning: Megatron's, the RAT+ model's, the machine's, the preset's, what follows from the data,
the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.arguments import parse_and_validate_args, parse_args

from rat_megatron.checkpoint.torch_dist import ARCHITECTURE, read_checkpoint_args
from rat_megatron.data.loader.order import order_difference, order_facts
from rat_megatron.data.loader.streams import check_streams, parse_data_path
from rat_megatron.errors import UserError
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.arguments import presets
from rat_megatron.training.arguments.fp8 import add_fp8_args, check_fp8
from rat_megatron.training.arguments.layout import check_dilations, check_layout, check_ranks, query_groups

_INTERVALS: dict[str, Any] = {"eval_interval": 1000, "save_interval": 1000}  # Megatron has none, and fails without
_CHECKPOINTING: dict[str, Any] = {
    "ckpt_format": "torch_dist",
    "dist_ckpt_optim_fully_reshardable": True,  # Megatron's own default cannot resume the optimizer at another TP or PP
    "dist_ckpt_strictness": "log_unexpected",  # of what a checkpoint lacks; megatron_hooks.py lets it be FP8's state alone
}
_DATA: dict[str, Any] = {
    "dataloader_type": "external",
    "tokenizer_type": "NullTokenizer",  # the data are tokens already
    "split": "1",  # unused: a stream carries its own validation split
}


def parse_arguments() -> Namespace:
    """Reads, completes and checks the command line, and sets Megatron's globals; raises UserError or PatternError."""
    try:
        given = parse_args(_add_rat_args)
        return parse_and_validate_args(partial(_add_rat_args, derived=_check_and_derive(given)))
    except AssertionError as error:  # how Megatron refuses arguments
        raise UserError(str(error) or "Megatron refuses this combination of arguments") from error


def _add_rat_args(parser: argparse.ArgumentParser, derived: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="rat")
    group.add_argument("--rat-pattern", default="dense", help="Attention pattern to train: dense, d16, d16w256s4, [dense,d64]*12, ...")
    group.add_argument(
        "--rat-arl-pattern",
        help="Pattern of the sparse step of active recurrence learning, or 'none'. Default: d64, and none with --pretrained-checkpoint.",
    )
    group.add_argument(
        "--no-rat-recurrence", action="store_false", dest="rat_recurrence", help="Train the plain-attention baseline: no recurrence."
    )
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
    group.add_argument("--rat-preset", choices=list(presets.PRETRAIN), help="Fills every flag that is not given with the paper's recipe.")
    group.add_argument(
        "--rat-hang-timeout-in-mins",
        type=float,
        help="Without progress for so long, every rank shows its stack and the run ends. Default: it waits.",
    )
    add_fp8_args(group)

    parser.error = _refuse
    parser.set_defaults(**presets.MODEL, **_INTERVALS, **_CHECKPOINTING, **_DATA, **_platform_defaults())
    if preset := _given("--rat-preset"):
        recipe = dict((presets.ADAPT if _given("--pretrained-checkpoint") else presets.PRETRAIN).get(preset, {}))
        if _given("--lr-warmup-iters"):  # Megatron takes one of the two
            recipe.pop("lr_warmup_fraction", None)
        parser.set_defaults(**recipe)
    parser.set_defaults(**(derived or {}))
    _let_help_print(parser)
    return parser


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


def _refuse(message: str) -> None:
    raise UserError(message)


def _given(flag: str) -> str | None:
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
    defaults: dict[str, Any] = {"gradient_accumulation_fusion": cuda and (HAVE_TE or apex)}
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


def _check_and_derive(args: Namespace) -> dict[str, Any]:
    """Checks the command line against the model, the machine, the data and the checkpoint; returns the defaults that follow."""
    _check_complete(args)
    _check_features(args)
    check_layout(args)
    check_fp8(args)
    derived = _check_patterns(args) | _check_data(args)
    check_ranks(args)
    derived |= {
        "rat_data_order": _data_order(args),
        "load": args.load or args.save,
        "max_position_embeddings": args.max_position_embeddings or args.seq_length,
        "fp8_dot_product_attention": args.fp8_dot_product_attention or args.fp8_multi_head_attention,
    }
    if args.cuda_graph_impl == "full_iteration":  # Megatron insists; suspicious.py looks for NaN after every iteration
        derived["check_for_nan_in_loss_and_grad"] = False
        if args.rerun_mode == "validate_results":  # it would validate nothing, and wait for the device before every optimizer step
            derived["rerun_mode"] = "disabled"
    _check_checkpoints(args, derived)
    return derived


def _check_complete(args: Namespace) -> None:
    for flag in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters", "lr"):
        if getattr(args, flag) is None and not (flag == "train_iters" and args.train_samples):
            raise UserError(f"--{flag.replace('_', '-')} is missing: give it, or a --rat-preset ({', '.join(presets.PRETRAIN)})")
    decay_iters = args.lr_decay_iters or args.train_iters
    if decay_iters and args.lr_warmup_iters >= decay_iters:
        raise UserError(f"--lr-warmup-iters {args.lr_warmup_iters} must be below the {decay_iters} iterations of the decay")


def _check_features(args: Namespace) -> None:
    cuda = torch.cuda.is_available()
    if args.transformer_impl == "transformer_engine" and not (cuda and HAVE_TE):
        raise UserError("--transformer-impl transformer_engine needs a GPU with Transformer Engine: use --transformer-impl local here")
    refused = {
        "--multi-latent-attention": args.multi_latent_attention,
        "--num-experts": args.num_experts,
        "--mtp-num-layers": args.mtp_num_layers,
        "--swiglu": args.swiglu,
        "--window-size": args.window_size,
    }
    for flag, value in refused.items():
        if value:
            raise UserError(f"{flag} is not part of a RAT+ layer: leave it out")
    if args.cuda_graph_impl in ("local", "transformer_engine"):
        raise UserError(
            f"--cuda-graph-impl {args.cuda_graph_impl} would train one attention pattern where active recurrence learning and validation "
            "have several: use --cuda-graph-impl full_iteration"
        )
    if args.cuda_graph_impl != "none" and not cuda:
        raise UserError(f"--cuda-graph-impl {args.cuda_graph_impl} needs a GPU: leave it out on this machine")
    if args.tp_comm_overlap and not (args.sequence_parallel and args.tensor_model_parallel_size > 1):
        raise UserError("--tp-comm-overlap needs --sequence-parallel and --tensor-model-parallel-size above 1: give both, or leave it out")
    if args.tp_comm_overlap and args.transformer_impl == "local":
        raise UserError("--tp-comm-overlap overlaps inside Transformer Engine's layers, which this run does not have: leave it out")
    if args.rampup_batch_size or args.step_batch_size_schedule:
        raise UserError("--rampup-batch-size and --step-batch-size-schedule are not supported: give a fixed --global-batch-size")
    if args.dataloader_type != "external" or args.mock_data:
        raise UserError("RAT+ reads MDS streams: give --data-path and leave out --dataloader-type and --mock-data")


def _check_patterns(args: Namespace) -> dict[str, Any]:
    """Every pattern fits the model; words are brought to their shortest form."""
    arl = args.rat_arl_pattern or ("none" if args.pretrained_checkpoint else "d64")

    def shortest(word: str) -> str:
        pattern = AttentionPattern.parse(word)
        pattern.check(args.num_layers, args.num_attention_heads)
        return str(pattern)

    target = shortest(args.rat_pattern)
    check_dilations(args, [target, *([] if arl == "none" else [arl]), *(args.rat_eval_patterns or [])])
    return {
        "rat_pattern": target,
        "rat_arl_pattern": arl if arl == "none" else shortest(arl),
        "rat_eval_patterns": [shortest(word) for word in args.rat_eval_patterns or [target]],
    }


def _check_data(args: Namespace) -> dict[str, Any]:
    """The streams are whole and fit the model; vocabulary, EOD and tokenizer follow from them."""
    if not args.data_path:
        raise UserError("--data-path is missing: give one or more folders written by 'rat-megatron prepare', with weights if wanted")
    vocab_size = args.vocab_size if _given("--vocab-size") else None
    meta = check_streams(
        parse_data_path(args.data_path),
        seq_length=args.seq_length,
        vocab_size=vocab_size,
        cache=args.data_cache_path,
        cache_limit=args.rat_data_cache_limit,
    )
    if not meta.has_validation and args.eval_iters:
        raise UserError("the data of --data-path has no validation split: give --eval-iters 0, or prepare it with --val-fraction")
    return {
        "vocab_size": vocab_size or meta.vocab_size,
        "rat_eod_id": meta.eod_id,
        "rat_tokenizer_path": meta.tokenizer_path,
        "rat_tokenizer_name": meta.tokenizer_name,
        "rat_tokenizer_hash": meta.tokenizer_hash,
    }


def _data_order(args: Namespace) -> dict[str, Any]:
    """What fixes the order of the training samples; Megatron stores it with every checkpoint, as part of its arguments."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    batch = args.global_batch_size or args.micro_batch_size * (args.world_size // model)
    return order_facts(parse_data_path(args.data_path), seed=args.seed, global_batch_size=batch, cache=args.data_cache_path)


def _check_checkpoints(args: Namespace, derived: dict[str, Any]) -> None:
    """The checkpoint that the run starts from is there and holds this architecture."""
    if args.load and args.load != args.save and not _has_checkpoint(args.load):
        raise UserError(f"--load {args.load} holds no checkpoint (no latest_checkpointed_iteration.txt)")
    if args.pretrained_checkpoint and not _has_checkpoint(args.pretrained_checkpoint):
        raise UserError(f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint (no latest_checkpointed_iteration.txt)")
    resumed = derived["load"] if derived["load"] and _has_checkpoint(derived["load"]) else None
    source = resumed or args.pretrained_checkpoint
    if source is None:
        return
    stored = read_checkpoint_args(Path(source), args.ckpt_step if resumed else None)
    there, here = _architecture(stored), _architecture(Namespace(**vars(args) | derived))
    for name, value in here.items():
        if there[name] != value:
            raise UserError(
                f"the checkpoint in {source} has {name} {there[name]}, this run asks for {value}: "
                "give the flags of the checkpoint, or another folder"
            )
    if resumed and not args.finetune and not args.skip_train:
        _check_data_order(stored, derived["rat_data_order"], source, args.rat_allow_data_change)
        if not (args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
            _check_schedule(_schedule(stored), _schedule(args), source)


def _check_schedule(there: dict[str, Any], here: dict[str, Any], source: str) -> None:
    """Megatron insists on the checkpoint's schedule of learning rate and weight decay, but only while it loads."""
    for name, value in here.items():
        if value is not None and there.get(name) not in (None, value):
            raise UserError(
                f"the checkpoint in {source} was trained with {name} {there[name]}, this run asks for {value}: give the checkpoint's, or "
                "--override-opt-param-scheduler for the schedule of this run, or --use-checkpoint-opt-param-scheduler for the checkpoint's"
            )


def _schedule(args: Namespace) -> dict[str, Any]:
    """What fixes the learning rate and weight decay of every iteration; None where Megatron will fill it in."""
    plain = ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "lr_warmup_samples", "lr_decay_samples", "train_samples")
    plain += ("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style")
    schedule = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in plain}
    batch, iterations = getattr(args, "global_batch_size", None), getattr(args, "train_iters", None)
    if batch and iterations and not args.train_samples:
        decay = batch * (args.lr_decay_iters or iterations)
        warmup = batch * args.lr_warmup_iters if args.lr_warmup_fraction is None else args.lr_warmup_fraction * decay
        schedule |= {"--train-iters times --global-batch-size": batch * iterations}
        schedule |= {"--lr-decay-iters times --global-batch-size": decay, "a warmup in samples of": warmup}
    return schedule


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


def _say(line: str) -> None:
    """One line in the log, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"rat-megatron: {line}", flush=True)


def _architecture(args: Namespace) -> dict[str, Any]:
    """What must be the same for a checkpoint's weights to fit; widths that were not given are those that Megatron will fill in."""
    return {name: getattr(args, name, None) for name in ARCHITECTURE} | {
        "kv_channels": args.kv_channels or args.hidden_size // args.num_attention_heads,
        "ffn_hidden_size": args.ffn_hidden_size or 4 * args.hidden_size,
        "num_query_groups": query_groups(args),
    }


def _has_checkpoint(folder: str) -> bool:
    return (Path(folder) / "latest_checkpointed_iteration.txt").is_file()
