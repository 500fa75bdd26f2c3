"""Every patch of Megatron that a training run makes, each with its reason. tests/unit/test_patches.py walks this table."""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
import megatron.core.dist_checkpointing.validation as validation
import megatron.core.models.common.language_module.language_module as language_module
import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
import megatron.core.tensor_parallel.layers as layers
import megatron.training.checkpointing as checkpointing
import megatron.training.initialize as initialize
import megatron.training.models.dist_utils as dist_utils
import megatron.training.training as training
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch.distributed.checkpoint import FileSystemReader

from rat_megatron.checkpoint import optimizer_rows, writer
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.arguments.batch_size import count_on
from rat_megatron.training.loop.arl import arl_train_step, leave_out_step, names_of_values, step_loaded_first
from rat_megatron.training.loop.cuda_graphs import CudaGraphs
from rat_megatron.training.loop.exit_signal import EarlyExitSignal
from rat_megatron.training.loop.failed_step import ending_whole
from rat_megatron.training.loop.skipped_spikes import skipping_spikes
from rat_megatron.training.loop.validation import evaluate_patterns, record_losses
from rat_megatron.training.monitoring.flops import iteration_flops
from rat_megatron.training.monitoring.loss_spikes import noting_spikes
from rat_megatron.training.monitoring.metrics import RunMetrics, a_line_an_interval
from rat_megatron.training.monitoring.watchdog import Watchdog
from rat_megatron.training.patches import Patch, fused, loading, optimizer, saving


def megatron_patches(
    args: Namespace, exit_signal: EarlyExitSignal, metrics: RunMetrics, graphs: CudaGraphs, watchdog: Watchdog | None = None
) -> list[Patch]:
    """What puts RAT+ into Megatron's loop, for validated arguments and the parts of a run."""
    return [
        *_loop(args, exit_signal, metrics, graphs, watchdog),
        *_evaluation(args, metrics),
        *_kernels(args),
        *_checkpoints(args, watchdog),
        *_optimizer(args),
    ]


def _loop(args: Namespace, exit_signal: EarlyExitSignal, metrics: RunMetrics, graphs: CudaGraphs, watchdog: Watchdog | None) -> list[Patch]:
    """train() calls the module's global train_step; what comes later here is further outside."""
    rows = []
    if watchdog:
        rows += [Patch(training, "train_step", watchdog.beating, "The microbatches of a CUDA graph's replay pass without a word.")]
    if args.rat_arl_pattern != "none":
        sparse, target = AttentionPattern.parse(args.rat_arl_pattern), AttentionPattern.parse(args.rat_pattern)
        two_steps = partial(arl_train_step, sparse=sparse, dense=target)
        rows += [Patch(training, "train_step", two_steps, "Active recurrence learning: an iteration is a sparse and a dense step.")]
    if args.train_samples and args.rat_resumed:
        why = (
            "Megatron counts the iterations of --train-samples as if the batch had always been what it is now: a run that resumes with "
            "another one would end too early or too late."
        )
        rows += [Patch(training, "update_train_iters", lambda _: count_on, why)]
    if args.rat_skip_spikes:
        skipping = partial(skipping_spikes, args=args, names=names_of_values(args))
        why = "--rat-skip-spikes: Megatron updates before anyone has compared the loss, and knows no running statistics."
        rows += [Patch(training, "train_step", skipping, why)]
    return rows + [
        Patch(training, "train_step", step_loaded_first, "Both steps use the same microbatches, drawn before anything is computed."),
        Patch(
            training, "dummy_train_step", lambda _: leave_out_step,
            "--iterations-to-skip draws the batch on the first tensor-parallel rank and sends it to the others in another form: here every "
            "rank draws its own, and those that did not would stay a batch behind.",
        ),
        Patch(training, "train_step", metrics.timed, "The tokens per second of report.json come from the duration of iterations."),
        Patch(training, "train_step", noting_spikes, "A NaN or a jump of the loss leaves the samples it came from."),
        Patch(
            training, "train_step", partial(ending_whole, args=args),
            "After a NaN, Megatron saves a checkpoint whose every resumption ends in its first step.",
        ),
        Patch(training, "train_step", exit_signal.handed_over, "A signal that came before Megatron listened is not lost."),
        Patch(
            training, "training_log", a_line_an_interval,
            "Megatron counts the iteration of its first line again in the second, also with --log-interval 1: after a resumption, that "
            "one shows another loss than the uninterrupted run's.",
        ),
        Patch(
            training, "FullCudaGraphWrapper", graphs.wrapper,
            "--cuda-graph-impl full_iteration: a graph replays the pattern it was captured under, so every pattern has its own.",
        ),
        Patch(
            initialize, "_compile_dependencies", lambda _: lambda: None,
            "The wheel brings the dataset helpers compiled and no Makefile: the make that this function runs would end the program.",
        ),
    ]  # fmt: skip


def _evaluation(args: Namespace, metrics: RunMetrics) -> list[Patch]:
    target = AttentionPattern.parse(args.rat_pattern)
    of_patterns = partial(
        evaluate_patterns, patterns=[AttentionPattern.parse(word) for word in args.rat_eval_patterns], target=target, metrics=metrics
    )
    return [
        Patch(training, "evaluate", partial(record_losses, target=target, metrics=metrics), "Validation losses go to report.json."),
        Patch(training, "evaluate_and_print_results", of_patterns, "Validation is one under every pattern of --rat-eval-patterns."),
        Patch(
            training, "num_floating_point_operations", lambda _: iteration_flops,
            "Megatron's count misses the forget gate and sparse patterns, and counts one step.",
        ),
    ]  # fmt: skip


def _kernels(args: Namespace) -> list[Patch]:
    rows = []
    if args.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
        why = (
            "Transformer Engine adds weight gradients to the accumulated ones inside the matrix product; for the output layer, Megatron "
            "wants Apex's extension, for a product that Transformer Engine has too."
        )
        rows += [
            Patch(layers, "fused_weight_gradient_mlp_cuda", lambda _: fused.WeightGradient, why, may_be_missing=True),
            Patch(layers, "_grad_accum_fusion_available", lambda _: True, why),
        ]
    if language_module.te_parallel_cross_entropy is not None:
        why = (
            "Transformer Engine's cross-entropy (chosen in model/config.py) may overwrite the logits, which nobody reads again; Megatron "
            "does not let it, and they would be in memory twice where memory is fullest."
        )
        rows += [Patch(language_module, "te_parallel_cross_entropy", lambda _: fused.cross_entropy_in_place, why)]
    return rows


def _checkpoints(args: Namespace, watchdog: Watchdog | None) -> list[Patch]:
    missing, saves = "_determine_missing_and_unexpected_keys", saving.Saves(args)
    rows = [
        Patch(
            TorchDistLoadShardedStrategy, "load_tensors_metadata", loading.without_strides,
            "Checking a checkpoint's keys (--dist-ckpt-strictness) fails on the strides that newer versions of torch note beside them.",
        ),
        Patch(
            validation, missing, partial(loading.without_what_is_left_out, args=args),
            "--dist-ckpt-strictness raise_all refuses a checkpoint of another layout for states of ranks that Megatron itself leaves out.",
        ),
        Patch(
            validation, missing, partial(loading.lacking_fp8_state_only, args=args),
            "FP8's state is the one thing that a checkpoint may lack, or have too much: it was written in bf16, by other layers, or the "
            "other way round. Megatron would load whatever fits, after an error in silence.",
        ),
        Patch(GPTModel, "load_state_dict", loading.with_weights_whole, "The same, where the state meets the model."),
        Patch(
            training, "save_checkpoint_and_time", partial(saving.unless_saved, args=args),
            "A finished run that is started again, or one that ends after a NaN, would write its last checkpoint over itself, and a kill "
            "meanwhile would lose it.",
        ),
        Patch(
            checkpointing, "maybe_msc", saves.noting_the_latest,
            "A kill between opening and writing the tracker file would leave it empty, and with it no checkpoint to resume from. Older "
            "iterations go once it is written.",
        ),
        Patch(
            checkpointing.dist_checkpointing, "save", saves.with_hashes,
            "Files that are damaged later would load as weights: --verify-integrity hashes on one rank alone, and refuses older ones. "
            "A full disk would leave half an iteration and a traceback. With --async-save, Megatron's writer reads the device's memory, "
            "which it cannot with expandable segments, and training changes host memory while it is written.",
        ),
        Patch(FileSystemReader, "read_data", loading.in_threads, "torch reads one tensor after the other, at about 1 GB/s."),
        Patch(checkpointing, "_load_global_dist_base_checkpoint", loading.with_files_checked, "The hashes are compared."),
        Patch(
            training, "save_checkpoint", partial(saving.of_finite_weights, args=args),
            "Weights that are not finite would become the latest checkpoint, and every run from it would end the same way.",
        ),
        Patch(
            training, "save_checkpoint", saves.one_at_a_time,
            "With --async-save a second save would begin beside the first: twice the host memory, and two half iterations if it fails. A "
            "host without memory for even one would have the run killed.",
        ),
        Patch(training, "load_checkpoint", partial(loading.with_finite_weights, args=args), "The same, of older checkpoints."),
    ]  # fmt: skip
    if args.save_retain_interval:
        why = "Megatron would leave half of an iteration where it is killed, and remove one that another run started from."
        rows += [Patch(checkpointing, "_async_delete_checkpoint_impl", lambda _: saving.nothing, why)]
    if args.async_save:
        why = "Megatron would wait for ever for the process that writes, where that has been killed."
        rows += [Patch(PersistentAsyncCaller, "is_current_async_call_done", saving.of_a_living_writer, why)]
        why = "The first save in the background would hold training up for as long as it takes to get its host memory."
        rows += [Patch(training, "train", saves.with_memory, why)]
        why = "The processes that write would outlive a run that is killed, with its host memory."
        rows += [
            Patch(PersistentAsyncCaller, "async_loop", lambda _: partial(writer.writing_loop, os.getpid()), why),
            Patch(filesystem_async, "_results_queue", lambda _: writer.results_queue(), why),
        ]
    if watchdog:
        rows += [Patch(training, "save_checkpoint_and_time", watchdog.beating, "Saving takes long without a microbatch.")]
    return rows


def _optimizer(args: Namespace) -> list[Patch]:
    owner = distrib_optimizer.DistributedOptimizer
    rows = [
        Patch(training, "get_megatron_optimizer_config", optimizer.decay_every_parameter, "RAT+ decays every parameter, norms included."),
        *(
            Patch(
                owner, name, make,
                "Fully reshardable checkpoints gather the whole optimizer on every rank before anything is written, and take parameters "
                "from the wrong places once a bucket of the buffer has had to be padded: moments and master weights would be lost.",
            )
            for name, make in (
                ("sharded_param_state_fully_reshardable", lambda _: optimizer_rows.sharded_rows),
                ("load_parameter_state_from_fully_reshardable", lambda _: optimizer_rows.load_rows),
            )
        ),
        *(
            Patch(
                owner, name, make,
                "--use-precision-aware-optimizer: a fully reshardable checkpoint would hold as numbers the halves of fp32 parameters that "
                "Transformer Engine keeps, and could not be loaded.",
            )
            for name, make in (
                ("_get_main_param_and_optimizer_states", optimizer.with_whole_main_params),
                ("_set_main_param_and_optimizer_states", optimizer.with_main_params_split),
            )
        ),
    ]  # fmt: skip
    if args.optimizer == "muon":
        why = (
            "Muon orthogonalizes each matrix of the fused projection by itself, and Megatron does not know of the forget gate's: it would "
            "cut in wrong places, or not at all."
        )
        rows += [Patch(megatron_optimizer, "_get_qkv_split_shapes", optimizer.with_forget_gate, why)]
    if args.use_layer_wise_distributed_optimizer:  # as Megatron calls --optimizer muon with --use-distributed-optimizer
        why = (
            "Of Megatron's two ways to build a model only one lays its gradients out for Muon, each matrix whole on a data-parallel rank; "
            "in the other, every rank gets all gradients and gathers parameters in pieces of unequal size, which gloo refuses."
        )
        rows += [
            Patch(dist_utils, "_ddp_wrap", optimizer.with_matrices_apart, why),
            Patch(dist_utils, "DistributedOptimizer", lambda _: LayerWiseDistributedOptimizer, why),
        ]
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        why = (
            "The distributed optimizer cannot resume with torch's Adam: it fails when asked for its state before the first step, then over "
            "the step count, which torch keeps per parameter, and would count each step many times."
        )
        rows += [
            Patch(owner, "state_dict", optimizer.begun, why),
            Patch(owner, "_set_main_param_and_optimizer_states", optimizer.without_step, why),
            Patch(owner, "load_state_dict", optimizer.with_steps_apart, why),
        ]
    return rows
