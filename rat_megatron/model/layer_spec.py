"""Megatron-core specs of RAT+ layers and blocks, with Transformer Engine or without.

Megatron's own ``--spec rat_megatron.model.layer_spec get_rat_block_spec`` takes them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelLinear, TEDotProductAttention, TENorm, TERowParallelLinear
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

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
    te = config.transformer_impl == "transformer_engine"
    if te:
        if not HAVE_TE:
            raise ValueError("transformer_impl is 'transformer_engine', but Transformer Engine is not installed: use 'local'")
        submodules = get_gpt_layer_with_transformer_engine_submodules()
        core_attention: Callable[..., RATCoreAttention] = partial(RATCoreAttention, dense_attention=TEDotProductAttention)
    else:
        submodules = replace(get_gpt_layer_local_submodules(normalization="RMSNorm"), input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
        core_attention = RATCoreAttention
    of_queries, of_keys = _norms_of_queries_and_keys(config)
    attention = replace(submodules.self_attention.submodules, core_attention=core_attention, q_layernorm=of_queries, k_layernorm=of_keys)
    if getattr(config, "rat_norm_after", False):
        submodules, attention = _with_norms_after(submodules, attention, te)
    recurrent = getattr(config, "rat_recurrence", True)
    self_attention = ModuleSpec(
        module=RATSelfAttention if recurrent else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal} | ({"rotary_tables": RotaryTables()} if recurrent else {}),
        submodules=attention,
    )
    return ModuleSpec(module=TransformerLayer, submodules=replace(submodules, self_attention=self_attention))


def _norms_of_queries_and_keys(config: TransformerConfig) -> tuple[Callable | None, Callable | None]:
    if not getattr(config, "qk_layernorm", False):
        return None, None
    if getattr(config, "rat_qk_layernorm_over_heads", False):
        return partial(RMSNormOverHeads, heads=config.num_attention_heads), partial(RMSNormOverHeads, heads=config.num_query_groups)
    norm = TENorm if config.transformer_impl == "transformer_engine" else RMSNorm
    return norm, norm


def _with_norms_after(
    submodules: TransformerLayerSubmodules, attention: SelfAttentionSubmodules, te: bool
) -> tuple[TransformerLayerSubmodules, SelfAttentionSubmodules]:
    """Norms in the projections that attention and MLP end with, none before them."""
    column, row = (TEColumnParallelLinear, NormedTERowParallelLinear) if te else (ColumnParallelLinear, NormedRowParallelLinear)
    mlp = submodules.mlp  # a partial of Megatron's
    mlp = partial(mlp.func, submodules=replace(mlp.keywords["submodules"], linear_fc1=column, linear_fc2=row))
    attention = replace(attention, linear_qkv=column, linear_proj=row)
    return replace(submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp, mlp=mlp), attention


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


class RMSNormOverHeads(torch.nn.Module):
    """RMSNorm of queries or keys [s, b, heads, hn] over all heads of a layer at once, those of other tensor-parallel ranks too.

    Every rank has the weight of all heads, [heads * hn], and uses its own: so Megatron sums its gradient, as it does for qk_layernorm, and
    checkpoints hold one copy. ``heads``: of all ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int):
        super().__init__()
        self.eps, self.width, self._tp = eps, heads * hidden_size, ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        if heads % self._tp.size():
            raise ValueError(f"a norm over {heads} heads cannot be shared by {self._tp.size()} tensor-parallel ranks")
        self.weight = torch.nn.Parameter(torch.ones(self.width))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, wide = x.flatten(2), torch.promote_types(x.dtype, torch.float32)
        squares = own.to(wide).square().sum(-1, keepdim=True)
        # Forward and backward add up over ranks: each has a share of the squares, and of the gradient of their sum.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares, self._tp), self._tp)
        normed = (own * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)
        rank, width = self._tp.rank(), own.shape[-1]
        return (normed * self.weight[rank * width : (rank + 1) * width]).view(x.shape)


class _NormAfter:
    """A row-parallel projection with an RMSNorm of what it gives."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x)  # type: ignore[misc]
        return self.post_norm(output), bias


class NormedRowParallelLinear(_NormAfter, RowParallelLinear):
    """Megatron's."""


if HAVE_TE:

    class NormedTERowParallelLinear(_NormAfter, TERowParallelLinear):
        """Transformer Engine's."""
