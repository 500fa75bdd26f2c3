"""Megatron-core specs of RAT+ layers and blocks, with Transformer Engine or without.

Megatron's own ``--spec rat_megatron.model.layer_spec get_rat_block_spec`` takes them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

from rat_megatron.model.architecture import other_values
from rat_megatron.model.core_attention import RATCoreAttention
from rat_megatron.model.rat_attention import RATSelfAttention, RotaryTables


def get_rat_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of one RAT+ layer; of the plain-attention baseline where ``config.rat_recurrence`` is False.

    ``config.transformer_impl`` chooses Transformer Engine's modules or Megatron's local ones. Raises ValueError for settings that these
    layers would ignore, or that make another model (rat_megatron.model.architecture).
    """
    for name, value, right in other_values(config):
        raise ValueError(f"{name} is {value!r}, and a RAT+ layer has {right!r}")
    if config.transformer_impl == "transformer_engine":
        if not HAVE_TE:
            raise ValueError("transformer_impl is 'transformer_engine', but Transformer Engine is not installed: use 'local'")
        submodules = get_gpt_layer_with_transformer_engine_submodules()
        core_attention: Callable[..., RATCoreAttention] = partial(RATCoreAttention, dense_attention=TEDotProductAttention)
    else:
        submodules = replace(get_gpt_layer_local_submodules(normalization="RMSNorm"), input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
        core_attention = RATCoreAttention
    attention = replace(submodules.self_attention.submodules, core_attention=core_attention, q_layernorm=None, k_layernorm=None)
    recurrent = getattr(config, "rat_recurrence", True)
    self_attention = ModuleSpec(
        module=RATSelfAttention if recurrent else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal} | ({"rotary_tables": RotaryTables()} if recurrent else {}),
        submodules=attention,
    )
    return ModuleSpec(module=TransformerLayer, submodules=replace(submodules, self_attention=self_attention))


def get_rat_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's RAT+ layers and its final norm. ``vp_stage`` is the virtual pipeline chunk, if any."""
    transformer_config = getattr(config, "transformer", config)  # Megatron's --spec hands over a GPTModelConfig
    layers = get_num_layers_to_build(transformer_config, vp_stage=vp_stage)
    norm = TENorm if transformer_config.transformer_impl == "transformer_engine" else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[get_rat_layer_spec(transformer_config)] * layers, layer_norm=norm)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension, built as Megatron builds its norms.

    Under sequence parallelism each tensor-parallel rank sees part of the sequence, so the weight carries the mark by which Megatron
    sums its gradient over them; Megatron's own local norm refuses sequence parallelism. Raises ValueError for a config of another norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            zero_centered = ", layernorm_zero_centered_gamma" if config.layernorm_zero_centered_gamma else ""
            raise ValueError(f"RAT+ layers have a plain RMSNorm, and the config says {config.normalization}{zero_centered}")
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
