"""Checks of a whole command line against the model, the machine, the data and the checkpoint, before anything is started."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from rat_megatron.errors import UserError
from rat_megatron.ops.dispatch import HEAD_DIMS
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.arguments import presets
from rat_megatron.training.arguments.batch_size import check_batches, derive_batch_sizes
from rat_megatron.training.arguments.data import check_data
from rat_megatron.training.arguments.flags import given
from rat_megatron.training.arguments.fp8 import check_fp8
from rat_megatron.training.arguments.layout import check_dilations, check_layout, check_ranks
from rat_megatron.training.arguments.optimizer import check_optimizer
from rat_megatron.training.arguments.outputs import check_outputs
from rat_megatron.training.arguments.resume import check_checkpoints
from rat_megatron.training.arguments.schedule import check_complete_schedule


def check_and_derive(args: Namespace) -> dict[str, Any]:
    """Raises UserError or PatternError for the first thing that is wrong; returns the defaults that follow from the rest."""
    _check_complete(args)
    _check_features(args)
    check_optimizer(args)
    _check_skipping(args)
    check_layout(args)
    check_fp8(args)
    check_outputs(args)
    sizes = derive_batch_sizes(args)
    args = Namespace(**vars(args) | sizes)
    derived = sizes | _check_patterns(args) | check_data(args)
    check_ranks(args)
    derived |= {
        "load": args.load or args.save,
        "max_position_embeddings": _positions(args),
        "fp8_dot_product_attention": args.fp8_dot_product_attention or args.fp8_multi_head_attention,
    }
    derived["rat_spikes"] = None  # what --rat-skip-spikes compares with: resume.py takes it from a checkpoint
    if args.rat_skip_spikes or args.cuda_graph_impl == "full_iteration":  # looked at after every iteration; with graphs Megatron insists
        derived["check_for_nan_in_loss_and_grad"] = False
    if args.cuda_graph_impl == "full_iteration":
        if args.rerun_mode == "validate_results":  # it would validate nothing, and wait for the device before every optimizer step
            derived["rerun_mode"] = "disabled"
    if args.async_save:
        derived["use_persistent_ckpt_worker"] = True  # without it Megatron would save in the foreground
        derived["async_strategy"] = "mcore"
    if not (args.save and args.save_interval):
        derived["async_save"] = False  # the writer would wait for nothing
    check_checkpoints(args, derived)
    check_batches(args, derived["rat_resumed"][1] if derived["rat_resumed"] else 0)
    return derived


def _positions(args: Namespace) -> int:
    """Those of the checkpoint that the architecture is from grow where sequences are longer."""
    grows = args.rat_architecture_from and not given("--max-position-embeddings")
    return max(args.max_position_embeddings or 0, args.seq_length) if grows else args.max_position_embeddings or args.seq_length


_COUNTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "global_batch_size"),
    *("train_iters", "train_samples", "save_interval", "save_retain_interval"),
)


def _check_complete(args: Namespace) -> None:
    for flag in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters", "lr"):
        if getattr(args, flag) is None and not (flag == "train_iters" and args.train_samples):
            raise UserError(f"--{flag.replace('_', '-')} is missing: give it, or a --rat-preset ({', '.join(presets.SIZES)})")
    for flag in _COUNTS:
        if (value := getattr(args, flag)) is not None and value <= 0:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be above 0")
    if not math.isfinite(args.lr):
        raise UserError(f"--lr {args.lr} is no learning rate")
    if args.save_retain_interval and args.save_retain_interval % args.save_interval:
        raise UserError(
            f"--save-retain-interval {args.save_retain_interval} is not a multiple of --save-interval {args.save_interval}, so that few of "
            "its iterations are saved: choose a multiple"
        )
    check_complete_schedule(args)


def _check_features(args: Namespace) -> None:
    cuda = torch.cuda.is_available()
    if args.transformer_impl == "transformer_engine" and not (cuda and HAVE_TE):
        raise UserError("--transformer-impl transformer_engine needs a GPU with Transformer Engine: use --transformer-impl local here")
    if args.cuda_graph_impl in ("local", "transformer_engine"):
        raise UserError(
            f"--cuda-graph-impl {args.cuda_graph_impl} would train one attention pattern where active recurrence learning and validation "
            "have several: use --cuda-graph-impl full_iteration"
        )
    if args.cuda_graph_impl != "none" and not cuda:
        raise UserError(f"--cuda-graph-impl {args.cuda_graph_impl} needs a GPU: leave it out on this machine")
    width = args.kv_channels or args.hidden_size // args.num_attention_heads
    if args.cuda_graph_impl != "none" and width not in HEAD_DIMS:
        raise UserError(f"--cuda-graph-impl needs the kernels, whose heads are multiples of 16 wide up to 256, not {width}: leave it out")
    if args.tp_comm_overlap and not (args.sequence_parallel and args.tensor_model_parallel_size > 1):
        raise UserError("--tp-comm-overlap needs --sequence-parallel and --tensor-model-parallel-size above 1: give both, or leave it out")
    if args.tp_comm_overlap and args.transformer_impl == "local":
        raise UserError("--tp-comm-overlap overlaps inside Transformer Engine's layers, which this run does not have: leave it out")
    if args.init_model_with_meta_device and not (args.use_megatron_fsdp or args.use_torch_fsdp2):
        raise UserError("--init-model-with-meta-device gives weights no values but with Megatron's FSDP: leave it out")
    if args.rerun_mode == "report_stats":  # the parser's word for what is called report_determinism_stats inside
        raise UserError("--rerun-mode report_stats is not known to Megatron itself: give validate_results or disabled")
    if given("--async-strategy") == "nvrx":
        raise UserError("--async-strategy nvrx would write checkpoints without hashes: leave it out")
    if args.dataloader_type != "external" or args.mock_data:
        raise UserError("RAT+ reads MDS streams: give --data-path and leave out --dataloader-type and --mock-data")


def _check_skipping(args: Namespace) -> None:
    """What a snapshot on the device (loop/snapshot.py) cannot put back bit by bit."""
    if args.rat_skip_spikes is None:
        return
    if not 0 < args.rat_skip_spikes < math.inf:
        raise UserError(f"--rat-skip-spikes {args.rat_skip_spikes:g} is no number of standard deviations: give one above 0, such as 6")
    reasons = {
        "--fp16": (args.fp16, "its loss scale follows from the gradients of every step"),
        "--optimizer-cpu-offload": (args.optimizer_cpu_offload, "it has parameters of its own in host memory"),
        "--fp8-param-gather": (args.fp8_param_gather, "its weights have scales and transposes of their own"),
        "--fp4-param-gather": (args.fp4_param_gather, "its weights have scales and transposes of their own"),
        "--exp-avg-dtype fp8": ("fp8" in (args.exp_avg_dtype, args.exp_avg_sq_dtype), "such moments are rounded anew by every copy"),
        "--use-megatron-fsdp": (args.use_megatron_fsdp, "it keeps weights in buffers of its own"),
        "--use-torch-fsdp2": (args.use_torch_fsdp2, "it keeps weights in buffers of its own"),
        "--overlap-param-gather-with-optimizer-step": (
            args.overlap_param_gather_with_optimizer_step,
            "it sends weights out before the loss has been compared",
        ),
    }
    for flag, (is_given, reason) in reasons.items():
        if is_given:
            raise UserError(f"--rat-skip-spikes cannot undo a step with {flag}, as {reason}: leave one of them out")


def _check_patterns(args: Namespace) -> dict[str, Any]:
    """Every pattern fits the model and training; words are brought to their shortest form."""
    arl = args.rat_arl_pattern or ("none" if args.pretrained_checkpoint else "d64")

    def shortest(word: str) -> str:
        pattern = AttentionPattern.parse(word).fit(args.num_layers, args.num_attention_heads)
        pattern.check_trainable()
        return str(pattern)

    target = shortest(args.rat_pattern)
    check_dilations(args, [target, *([] if arl == "none" else [arl]), *(args.rat_eval_patterns or [])])
    return {
        "rat_pattern": target,
        "rat_arl_pattern": arl if arl == "none" else shortest(arl),
        "rat_eval_patterns": list(dict.fromkeys(shortest(word) for word in args.rat_eval_patterns or [target])),
    }
