"""Logits of a checkpoint by the model that Megatron builds from the arguments stored in it, with one layer of weights in memory at a time.

It is the source's side of a conversion's check, and shares nothing with the conversion: the arguments are taken as training had them,
and every parameter of Megatron's model takes the tensor of its own name. It runs on the CPU, also where there is a GPU, which others may
be using; a fixed prompt is not worth its memory.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from rat_megatron.errors import UserError, one_line
from rat_megatron.platform.cpu import cuda_means_cpu
from rat_megatron.training.patches import Patch, applied

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_ROWS = 4096  # of the output layer that are in memory in fp32 at a time
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

# Arguments that say how a run was laid out, in which precision and by which kernels. One process in fp32 has Megatron's defaults for them.
_LAYOUT_PREFIXES = (
    *("fp8", "fp4", "recompute_", "cuda_graph_", "tp_comm_", "cpu_offloading_", "account_for_", "overlap_", "num_layers_at_"),
    *("pipeline_model_parallel_", "virtual_pipeline_", "decoder_first_", "decoder_last_", "context_parallel_", "tensor_parallel_"),
)
_LAYOUT = (
    *("tensor_model_parallel_size", "sequence_parallel", "microbatch_group_size_per_vp_stage", "cp_comm_type", "use_ring_exchange_p2p"),
    *("deterministic_mode", "batch_invariant_mode", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "fused_residual_rmsnorm"),
    *("defer_embedding_wgrad_compute", "wgrad_deferral_limit", "distribute_saved_activations", "mlp_chunks_for_training"),
    *("enable_cuda_graph", "external_cuda_graph", "te_rng_tracker", "te_precision_config_file", "fp16_lm_cross_entropy"),
    *("attention_backend", "flash_attention_version", "first_last_layers_bf16", "init_model_with_meta_device", "config_logger_dir"),
)
_HERE: dict[str, Any] = {
    "transformer_impl": "local",
    "params_dtype": torch.float32,
    "bf16": False,
    "fp16": False,
    "use_cpu_initialization": True,
    "perform_initialization": False,  # every parameter is put in
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "untie_embeddings_and_output_weights": True,  # the rows of a tied output layer are put in as well
    "rat_pattern": "dense",
}


@torch.no_grad()
def megatron_logits(source: TorchDistCheckpoint, tokens: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor]:
    """Logits [t, padded vocab] of tokens [t] under dense attention, in fp32, once for each dtype that the weights are rounded to.

    ``dtypes`` begins with None, which is not at all, and may have one dtype after it. Megatron's globals, torch's and the process group
    are afterwards what they were. Raises UserError where Megatron builds no model of the stored arguments that takes the stored tensors.
    """
    stored = source.args()
    with _one_rank():
        model = _build(_complete(stored, len(tokens)), source)
        layer, final_norm = model.decoder.layers[0], model.decoder.final_layernorm
        model.decoder.final_layernorm = None  # it comes after the last layer only
        rows = _read(source, _EMBEDDING)[tokens]  # a vocabulary of the prompt's own tokens: its ids are 0, 1, ...
        xs = [_embedded(model, rows.to(dtype or rows.dtype).float()) for dtype in dtypes]
        for number in range(stored.num_layers):
            _put_layer(layer, source, number)
            xs = [_through_layer(model, x, dtype) for x, dtype in zip(xs, dtypes, strict=True)]
        _put(final_norm, {"weight": _read(source, "decoder.final_layernorm.weight")}, source)
        normed = []
        for x, dtype in zip(xs, dtypes, strict=True):
            _round(final_norm, dtype)
            normed.append(final_norm(x))
        head = _read(source, _HEAD if stored.untie_embeddings_and_output_weights else _EMBEDDING)
        return [_logits(model, x, head, dtype)[:, 0] for x, dtype in zip(normed, dtypes, strict=True)]


def _complete(stored: Namespace, vocab_size: int) -> Namespace:
    """The stored arguments as one process in fp32 on a CPU has them; what is not stored has the default of the parser."""
    from rat_megatron.training.arguments import flags_of_this_program

    with mock.patch.object(sys, "argv", sys.argv[:1]):  # the defaults of a preset follow from what is typed there
        defaults = vars(flags_of_this_program().parse_args([]))
    kept = {name: value for name, value in vars(stored).items() if not name.startswith(_LAYOUT_PREFIXES) and name not in (*_LAYOUT, *_HERE)}
    args = Namespace(**{**defaults, **kept, **_HERE, "vocab_size": vocab_size, "padded_vocab_size": vocab_size})
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    return args


def _build(args: Namespace, source: TorchDistCheckpoint) -> GPTModel:
    """Megatron's GPTModel as training builds it, of all its layers but one with memory for its weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from rat_megatron.model.config import rat_model_config_from_args

    try:
        config = rat_model_config_from_args(args)
        block_spec = config.transformer_layer_spec

        def first_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
            block = block_spec(config, vp_stage)
            return replace(block, layer_specs=block.layer_specs[:1])

        config.transformer_layer_spec = first_layer_spec
        return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True).eval()
    except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"Megatron builds no model of the arguments in {source.folder}: {one_line(error)}") from error


def _embedded(model: GPTModel, rows: Tensor) -> Tensor:
    """rows [t, h] of the prompt's tokens -> [t, 1, h], by Megatron's embedding."""
    positions = torch.arange(len(rows))[None]
    model.embedding.word_embeddings.weight.data = rows
    return model.embedding(input_ids=positions, position_ids=positions)


def _through_layer(model: GPTModel, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x [t, 1, h] through GPTModel's forward, with RoPE as it makes it, up to the output layer."""
    _round(model.decoder.layers[0], dtype)
    return model(None, None, None, decoder_input=x, output_processor=lambda hidden_states, **_: hidden_states)


def _logits(model: GPTModel, x: Tensor, head: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x [t, 1, h] -> [t, 1, padded vocab] by Megatron's output layer, which has some of its rows at a time."""
    parts = []
    for rows in head.split(_ROWS):
        model.output_layer.weight.data = rows.to(dtype or rows.dtype).float()
        parts.append(model.output_layer(x)[0])
    return torch.cat(parts, dim=-1)


def _put_layer(layer: Any, source: TorchDistCheckpoint, number: int) -> None:
    """Makes the model's layer the one of this number."""
    for module in layer.modules():
        if hasattr(module, "layer_number"):
            module.layer_number = number + 1  # what a layer does may depend on it
    renamed = layer.submodules_config.sharded_state_dict_keys_map
    for name, _ in layer.named_parameters():
        theirs = next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)
        keys = [(f"decoder.layers.{known}", number) for known in (name, theirs)]
        keys += [(f"decoder.layers.{number}.{known}", None) for known in (name, theirs)]
        key, index = next(((key, index) for key, index in keys if key in source.tensors), keys[0])
        _put(layer, {name: _read(source, key, index)}, source)


def _put(module: torch.nn.Module, weights: dict[str, Tensor], source: TorchDistCheckpoint) -> None:
    """Gives parameters of a module these values in fp32, in place of the memory that they had."""
    for name, weight in weights.items():
        parameter = module.get_parameter(name)
        if parameter.shape != weight.shape:
            raise UserError(
                f"{source.folder} has {tuple(weight.shape)} for {name}, but the model of its arguments has {tuple(parameter.shape)}"
            )
        parameter.data = weight.float()


def _round(module: torch.nn.Module, dtype: torch.dtype | None) -> None:
    for parameter in module.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype).float()


def _read(source: TorchDistCheckpoint, key: str, index: int | None = None) -> Tensor:
    if key not in source.tensors:
        raise UserError(f"{source.folder} has no {key}, which the model of its arguments has")
    return source.read(key, index)


@contextmanager
def _one_rank() -> Iterator[None]:
    """Megatron's parallel state for one process on the CPU: that which is there, or one for as long as the block lasts."""
    with _quiet(), cuda_means_cpu():
        from megatron.core import parallel_state
        from megatron.core.models.common.language_module.language_module import LanguageModule

        before = vars(parallel_state).copy()
        new_group, new_state = not torch.distributed.is_initialized(), not parallel_state.model_parallel_is_initialized()
        if not new_group and torch.distributed.get_world_size() > 1:
            raise UserError("a conversion is checked in one process: run it outside of torchrun")
        why = "It sets variables of the environment, which last, for Transformer Engine's attention; and refuses some that are set."
        with applied([Patch(LanguageModule, "_set_attention_backend", lambda _: lambda self: None, why)]):
            try:
                if new_group:
                    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
                if new_state:
                    parallel_state.initialize_model_parallel()
                yield
            finally:
                if new_state:
                    parallel_state.destroy_model_parallel()
                    vars(parallel_state).update(before)  # it leaves some ranks and groups behind
                if new_group and torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, here of libraries for GPUs that are missing and of GPTModel's future."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
