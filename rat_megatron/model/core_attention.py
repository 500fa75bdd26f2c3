"""The core attention of RAT+ layers: dense or under a sparse pattern, switchable between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron.core.enums import Fp8Recipe
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import unwrap_model
from torch import Tensor

from rat_megatron.ops.dilated_attention import dilated_attention
from rat_megatron.parallel.context_parallel import attention_context_parallel
from rat_megatron.ratplus.pattern import AttentionPattern


def refuse_packed_documents(packed_seq_params: PackedSeqParams | None) -> None:
    """Raises ValueError where Megatron hands over the bounds of documents: recurrence and sparse patterns would run across them."""
    if packed_seq_params is not None:
        raise ValueError("RAT+ layers do not support packed documents (packed_seq_params): every row is one document to them")


class RATCoreAttention(MegatronModule):
    """Causal attention under this layer's pattern; takes the place of Megatron's DotProductAttention.

    ``dense_attention`` builds the module that serves dense patterns (Transformer Engine's, say); without one, the torch operator
    serves them too. Source: arXiv 2602.18196, dilated attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        dense_attention: Callable[..., MegatronModule] | None = None,
    ):
        for name, plain in {"softmax_type": "vanilla", "window_size": None, "apply_query_key_layer_scaling": False}.items():
            if getattr(config, name) != plain:
                raise ValueError(f"RAT+ attention has no {name}, and the config says {getattr(config, name)}")
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.dense = None
        if dense_attention is not None:
            self.dense = dense_attention(
                config=config,
                layer_number=layer_number,
                attn_mask_type=attn_mask_type,
                attention_type=attention_type,
                cp_comm_type=cp_comm_type,
                softmax_scale=softmax_scale,
                pg_collection=pg_collection,
            )
        self.set_pattern(AttentionPattern.parse(getattr(config, "rat_pattern", "dense")))

    def set_pattern(self, pattern: AttentionPattern) -> None:
        """Chooses what the queries of the next forward pass see; raises PatternError for a pattern that only the exported model has."""
        pattern.check_trainable()
        self.pattern = pattern.layer(self.layer_number - 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [sq, b, np, hn], key and value [sk, b, ng, hn] -> [sq, b, np * hn]. The pattern is the mask: none is taken."""
        refuse_packed_documents(packed_seq_params)
        if self.pattern.is_dense and self.dense is not None:
            return self.dense(query, key, value, attention_mask, attn_mask_type=attn_mask_type)
        heads = query.shape[2]
        pattern = self.pattern.head_slice(self.pg_collection.tp.rank() * heads, heads)
        if self.pg_collection.cp.size() > 1:
            output = attention_context_parallel(query, key, value, pattern, self.softmax_scale, self.pg_collection.cp)
        else:
            output = dilated_attention(query, key, value, pattern, self.softmax_scale)
        return output.flatten(2)  # [sq, b, np, hn] -> [sq, b, np * hn]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """With the scales of FP8 attention under delayed scaling, which Megatron leaves out: a resumed run would begin with none."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.dense is None or self.config.fp8_recipe != Fp8Recipe.delayed:
            return state
        own: dict[str, Any] = {}
        self.dense._save_to_state_dict(own, "", keep_vars=True)
        return state | make_sharded_tensors_for_checkpoint(
            {name: value for name, value in own.items() if name == "_extra_state"},
            f"{prefix}dense.",
            sharded_offsets=sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def set_attention_pattern(model_chunks: Iterable[MegatronModule], pattern: AttentionPattern) -> None:
    """Switches every layer of a model (all its pipeline chunks on this rank) to a pattern, from the next forward pass on."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, RATCoreAttention):
                module.set_pattern(pattern)
        unwrap_model(chunk).attention_pattern = pattern


def get_attention_pattern(model: MegatronModule) -> AttentionPattern:
    """The pattern that an unwrapped model chunk is switched to."""
    return getattr(model, "attention_pattern", None) or AttentionPattern.parse(model.config.rat_pattern)
