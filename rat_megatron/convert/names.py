"""The one table of weight names: Megatron's torch_dist checkpoint beside the Hugging Face format, and the layout of fused tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face weights it holds.

    ``megatron`` lists the names the tensor may have: with Transformer Engine's fused layers a norm is stored under the projection
    that follows it. ``hf`` has several names when the tensor is fused. Where ``hf`` says ``{layer}`` there is one tensor a layer,
    stored either stacked along a first axis of layers or under ``decoder.layers.{layer}.``.
    """

    hf: tuple[str, ...]
    megatron: tuple[str, ...]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf[0]

    def find(self, keys: Collection[str], layer: int) -> tuple[str, int | None] | None:
        """Where among a checkpoint's keys this row's tensor of one layer is: (key, index in the stack or None); None if it is not there."""
        for name in self.megatron:
            if name in keys:
                return name, layer if self.per_layer else None
            unstacked = name.replace("decoder.layers.", f"decoder.layers.{layer}.")
            if unstacked in keys:
                return unstacked, None
        return None


_LAYER, _ATTENTION = "model.layers.{layer}.", "model.layers.{layer}.self_attn."


def _fused(kind: str) -> Row:
    projections = ("q", "output_gate", "k", "v", "forget_gate")
    return Row(tuple(f"{_ATTENTION}{name}_proj.{kind}" for name in projections), (f"decoder.layers.self_attention.linear_qkv.{kind}",))


FUSED_QKV, FUSED_QKV_BIAS = _fused("weight"), _fused("bias")

# Without SwiGLU there is no gate projection.
FUSED_MLP = Row((_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"), ("decoder.layers.mlp.linear_fc1.weight",))

# Norms before attention and MLP, or, where there is the last one, behind them.
_BEFORE_ATTENTION = Row(
    (_LAYER + "input_layernorm.weight",),
    ("decoder.layers.input_layernorm.weight", "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
)
_BEFORE_MLP = Row(
    (_LAYER + "post_attention_layernorm.weight",),
    ("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
)
_AFTER_ATTENTION = Row((_LAYER + "post_attention_layernorm.weight",), ("decoder.layers.self_attention.linear_proj.post_norm.weight",))
_AFTER_MLP = Row((_LAYER + "post_feedforward_layernorm.weight",), ("decoder.layers.mlp.linear_fc2.post_norm.weight",))

TABLE = (
    Row(("model.embed_tokens.weight",), ("embedding.word_embeddings.weight",)),
    _BEFORE_ATTENTION,
    FUSED_QKV,
    FUSED_QKV_BIAS,
    Row((_ATTENTION + "q_norm.weight",), ("decoder.layers.self_attention.q_layernorm.weight",)),
    Row((_ATTENTION + "k_norm.weight",), ("decoder.layers.self_attention.k_layernorm.weight",)),
    Row((_ATTENTION + "o_proj.weight",), ("decoder.layers.self_attention.linear_proj.weight",)),
    _BEFORE_MLP,
    _AFTER_ATTENTION,
    FUSED_MLP,
    Row((_LAYER + "mlp.down_proj.weight",), ("decoder.layers.mlp.linear_fc2.weight",)),
    _AFTER_MLP,
    Row(("model.norm.weight",), ("decoder.final_layernorm.weight",)),
    Row(("lm_head.weight",), ("output_layer.weight",)),
)


def rows_of(names: Collection[str]) -> list[Row]:
    """The rows of a model whose Hugging Face weights have these names."""
    after = _AFTER_MLP.hf[0].format(layer=0) in names
    left_out = (_BEFORE_ATTENTION, _BEFORE_MLP) if after else (_AFTER_ATTENTION, _AFTER_MLP)
    return [row for row in TABLE if row not in left_out and any(name.format(layer=0) in names for name in row.hf)]


def split_fused_qkv(
    weight: torch.Tensor, num_heads: int, num_groups: int, head_dim: int, recurrence: bool, output_gate: bool = True
) -> dict[str, torch.Tensor]:
    """Takes the fused projection [out, h], or its bias [out], apart into those of FUSED_QKV.hf that there are, by projection.

    Rows lie per query group, groups outermost: ``[q | output gate | k | v | forget gate]``, the first two with the group's heads.
    Raises ValueError when the rows do not add up.
    """
    query = num_heads // num_groups * head_dim
    widths = {"q": query, "output_gate": query * output_gate, "k": head_dim, "v": head_dim, "forget_gate": head_dim * recurrence}
    if weight.shape[0] != num_groups * sum(widths.values()):
        raise ValueError(f"the fused projection has {weight.shape[0]} rows, expected {num_groups} groups of {sum(widths.values())}")
    groups = weight.unflatten(0, (num_groups, sum(widths.values())))
    parts = zip(widths, groups.split(list(widths.values()), dim=1), strict=True)
    return {name: part.flatten(0, 1) for name, part in parts if widths[name]}


def fuse_qkv(parts: Sequence[torch.Tensor], num_groups: int) -> torch.Tensor:
    """The fused projection [out, h], or its bias, of those that FUSED_QKV.hf names, in that order: the inverse of split_fused_qkv."""
    return torch.cat([part.unflatten(0, (num_groups, -1)) for part in parts], dim=1).flatten(0, 1)
