"""Every patch of Megatron, each with its reason. tests/unit/test_megatron_hooks.py fails when Megatron changes beneath one.

What a machine without CUDA needs beyond these is in rat_megatron/platform/cpu.py.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.validation as validation
import megatron.core.models.common.language_module.language_module as language_module
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
import megatron.core.tensor_parallel.layers as layers
import megatron.training.checkpointing as checkpointing
import megatron.training.initialize as initialize
import megatron.training.training as training
import torch
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.msc_utils import maybe_msc
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rat_megatron.errors import UserError
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.loop.arl import arl_train_step, step_loaded_first
from rat_megatron.training.loop.cuda_graphs import CudaGraphOfEachPattern
from rat_megatron.training.loop.exit_signal import EarlyExitSignal
from rat_megatron.training.loop.validation import evaluate_patterns, record_losses
from rat_megatron.training.monitoring.flops import iteration_flops
from rat_megatron.training.monitoring.loss_spikes import jumps_noted
from rat_megatron.training.monitoring.metrics import RunReport
from rat_megatron.training.monitoring.watchdog import Watchdog
from rat_megatron.training.patches.main_params import with_main_params_split, with_whole_main_params


def install_hooks(args: Namespace, exit_signal: EarlyExitSignal, watchdog: Watchdog | None = None) -> None:
    """Puts RAT+ into Megatron's loop, for validated arguments, under a watchdog's eyes if there is one. Call once, before ``pretrain``."""
    target = AttentionPattern.parse(args.rat_pattern)
    report = RunReport(Path(args.save) if args.save else None)

    # The wheel brings Megatron's dataset helpers compiled and no Makefile: the make that this function runs would end the program.
    initialize._compile_dependencies = lambda: None

    if watchdog:  # the microbatches of a CUDA graph's replay pass without a word
        training.train_step = watchdog.beating(training.train_step)

    # One iteration is two steps on microbatches drawn beforehand, and its duration is noted; train() calls the module's global.
    if args.rat_arl_pattern != "none":
        training.train_step = arl_train_step(training.train_step, AttentionPattern.parse(args.rat_arl_pattern), target)
    training.train_step = exit_signal.handed_over(jumps_noted(report.timed(step_loaded_first(training.train_step))))

    # --cuda-graph-impl full_iteration: a graph replays the pattern that it was captured under, so every pattern has its own.
    training.FullCudaGraphWrapper = CudaGraphOfEachPattern

    # Transformer Engine adds weight gradients to the accumulated ones inside the matrix product; for the output layer, Megatron wants
    # Apex's extension, for a product that Transformer Engine has too.
    if args.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = _WeightGradient, True

    # Transformer Engine's cross-entropy (chosen in model/builder.py) may overwrite the logits, which nobody reads again; Megatron does
    # not let it, and they would be in memory twice where memory is fullest.
    if language_module.te_parallel_cross_entropy is not None:
        language_module.te_parallel_cross_entropy = _cross_entropy_in_place

    # Validation under every pattern, and into report.json.
    patterns = [AttentionPattern.parse(word) for word in args.rat_eval_patterns]
    training.evaluate = record_losses(training.evaluate, target, report)
    training.evaluate_and_print_results = evaluate_patterns(training.evaluate_and_print_results, patterns, target, report)

    # The forget gate, sparse patterns and the second step count too.
    training.num_floating_point_operations = iteration_flops

    # RAT+ decays every parameter, norms included.
    training.get_megatron_optimizer_config = _decay_every_parameter(training.get_megatron_optimizer_config)

    # Checking a checkpoint's keys (--dist-ckpt-strictness) fails on the strides that newer versions of torch note beside them.
    TorchDistLoadShardedStrategy.load_tensors_metadata = _without_strides(TorchDistLoadShardedStrategy.load_tensors_metadata)

    # --dist-ckpt-strictness raise_all refuses any checkpoint of another layout, for the states of ranks that Megatron itself leaves out.
    validation._determine_missing_and_unexpected_keys = _without_what_is_left_out(validation._determine_missing_and_unexpected_keys, args)

    # FP8's state is the one thing that a checkpoint may lack, or have too much: it was written in bf16, by other layers, or the other way
    # round. Megatron would load whatever fits, after an error in silence. And Transformer Engine does not load that state of delayed
    # scaling unless told so, as it is a pickle; torch has unpickled all that is no tensor by then.
    validation._determine_missing_and_unexpected_keys = _lacking_fp8_state_only(validation._determine_missing_and_unexpected_keys, args)
    GPTModel.load_state_dict = _with_weights_whole(GPTModel.load_state_dict)
    os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")

    # Fully reshardable checkpoints of the distributed optimizer take parameters from the wrong places once a bucket of the buffer has had
    # to be padded (its length is no multiple of 128 and of the data-parallel size): moments and master weights would be lost silently.
    optimizer = distrib_optimizer.DistributedOptimizer
    optimizer.sharded_param_state_fully_reshardable = _from_padded_buckets(optimizer.sharded_param_state_fully_reshardable)

    # --use-precision-aware-optimizer: a fully reshardable checkpoint would hold as numbers the halves of fp32 parameters that Transformer
    # Engine keeps, and could not be loaded.
    optimizer._get_main_param_and_optimizer_states = with_whole_main_params(optimizer._get_main_param_and_optimizer_states)
    optimizer._set_main_param_and_optimizer_states = with_main_params_split(optimizer._set_main_param_and_optimizer_states)

    # The distributed optimizer cannot resume with torch's Adam (neither Transformer Engine nor Apex): it fails when asked for its state
    # before the first step, then over the step count, which torch keeps per parameter, and would count each step many times.
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizer.state_dict = _begun(optimizer.state_dict)
        optimizer._set_main_param_and_optimizer_states = _without_step(optimizer._set_main_param_and_optimizer_states)
        optimizer.load_state_dict = _with_steps_apart(optimizer.load_state_dict)

    # A finished run that is started again would write its last checkpoint over itself, and a kill meanwhile would lose it.
    training.save_checkpoint_and_time = _unless_saved(training.save_checkpoint_and_time, args)
    if watchdog:  # Megatron's calls that take long without a microbatch
        training.save_checkpoint_and_time = watchdog.beating(training.save_checkpoint_and_time)

    # A kill between opening and writing the tracker file would leave it empty, and with it no checkpoint to resume from.
    checkpointing.maybe_msc = _AtomicTracker()


class _WeightGradient:
    """Apex's fused_weight_gradient_mlp_cuda on Transformer Engine's matrix product: total += grad_output^T input."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input: torch.Tensor, grad_output: torch.Tensor, total: torch.Tensor) -> None:
        """input [n, h_in], grad_output [n, h_out], total [h_out, h_in]."""
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(input, grad_output, out_dtype=total.dtype, layout="NT", out=total, accumulate=True, grad=True)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, tp_group: Any, is_cg_capturable: bool) -> torch.Tensor:
    """logits [s, b, v / tp], labels [s, b] -> losses [s, b] in fp32."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(logits.contiguous(), labels, dist_process_group=tp_group, overwrite_input=True)


def _decay_every_parameter(get_megatron_optimizer_config):
    def get_config(args: Any):
        config, overrides = get_megatron_optimizer_config(args)
        return config, {key: value for key, value in overrides.items() if value.get("wd_mult") != 0.0}

    return get_config


def _without_strides(load_tensors_metadata: Callable) -> Callable:
    def load(self: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        metadata = metadata or FileSystemReader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                vars(entry.properties).pop("strides", None)
        return load_tensors_metadata(self, checkpoint_dir, metadata)

    return load


def _without_what_is_left_out(determine_keys: Callable, args: Namespace) -> Callable:
    def determine(*metadata: Any) -> tuple[set[str], set[str]]:
        missing, unexpected = determine_keys(*metadata)
        # The state of --rerun-mode and the random states (RAT+ draws nothing) belong to ranks; a new run takes weights only.
        left_out = {key for key in missing if key in ("rerun_state_machine_state", "rng_state")}
        if args.finetune or args.no_load_optim:
            left_out |= {key for key in missing if key.startswith("optimizer.")}
        return missing - left_out, unexpected

    return determine


def _lacking_fp8_state_only(determine_keys: Callable, args: Namespace) -> Callable:
    def determine(*metadata: Any) -> tuple[set[str], set[str]]:
        missing, unexpected = determine_keys(*metadata)
        lacking = _all_but_fp8_state(unexpected)
        if lacking and args.dist_ckpt_strictness == "log_unexpected":
            raise UserError(f"the checkpoint lacks {_some(lacking)}: give the flags it was written with")
        return missing, unexpected

    return determine


def _with_weights_whole(load_state_dict: Callable) -> Callable:
    def load(self: Any, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        keys = load_state_dict(self, state_dict, strict=False, **kwargs)
        wrong = _all_but_fp8_state([*keys.missing_keys, *keys.unexpected_keys])
        if wrong:
            raise UserError(f"the checkpoint does not fit the model in {_some(wrong)}: give the flags it was written with")
        return keys

    return load


def _all_but_fp8_state(keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if not key.endswith("._extra_state"))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _from_padded_buckets(sharded_param_state: Callable) -> Callable:
    def state(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda **options: _with_padding(gather(**options), self.buffers)
        try:
            return sharded_param_state(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return state


def _with_padding(state: dict[Any, Any] | None, buffers: list[Any]) -> dict[Any, Any] | None:
    """Puts back the padding between buckets that gathering took out: parameters are then where ``param_index_map`` has them."""
    for index, buffer in enumerate(buffers if state else []):
        for tensors in state[index].values():
            for name, packed in tensors.items():
                if isinstance(packed, torch.Tensor):
                    tensors[name] = packed.new_zeros(buffer.numel)
                    for bucket, values in zip(buffer.buckets, packed.split([b.numel_unpadded for b in buffer.buckets]), strict=True):
                        tensors[name][bucket.offset : bucket.offset + bucket.numel_unpadded] = values
    return state


def _begun(state_dict: Callable) -> Callable:
    def begin(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            for parameter in (parameter for group in self.optimizer.param_groups for parameter in group["params"]):
                moments = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return begin


def _without_step(set_states: Callable) -> Callable:
    def set_all_but_step(self: Any, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        set_states(self, parameter, {"step": None, **tensors})  # what is no tensor is left as it is

    return set_all_but_step


def _with_steps_apart(load_state_dict: Callable) -> Callable:
    def load(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    return load


def _unless_saved(save_checkpoint_and_time: Callable, args: Namespace) -> Callable:
    def save(iteration: int, *rest: Any, **kwargs: Any) -> None:
        if args.load != args.save or iteration != args.iteration:  # the iteration that was loaded
            save_checkpoint_and_time(iteration, *rest, **kwargs)

    return save


class _AtomicTracker:
    """Megatron's file access, except that ``latest_checkpointed_iteration.txt`` appears whole or not at all."""

    def __getattr__(self, name: str) -> Any:
        return getattr(maybe_msc, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any):
        if mode == "w" and os.path.basename(path) == "latest_checkpointed_iteration.txt":
            return _replacing(path)
        return maybe_msc.open(path, mode, **kwargs)


class _replacing:
    """A text file opened for writing that takes its place when it is closed without an error."""

    def __init__(self, path: str):
        self._path = path
        self._file = open(path + ".tmp", "w")

    def __enter__(self):
        return self._file

    def __exit__(self, error_type, *_):
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if error_type is None:
            os.replace(self._path + ".tmp", self._path)
