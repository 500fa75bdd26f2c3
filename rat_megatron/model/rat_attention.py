"""RAT+ self-attention: Megatron's SelfAttention whose keys and values first pass through a gated recurrence.

Source: arXiv 2602.18196, the RAT+ layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from rat_megatron.model.core_attention import refuse_packed_documents
from rat_megatron.ops.gated_scan import scan_mixed_qkv
from rat_megatron.parallel.context_parallel import scan_mixed_qkv_context_parallel


class RotaryTables:
    """Cosines and sines of RoPE's angles, one for the layers of a pipeline stage, which are all given the same tensor of angles."""

    def __init__(self):
        self._angles: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """angles [s, 1, 1, hn] -> two of [s, hn / 2]; computed anew where it is another tensor than the last."""
        if self._tables is None or self._angles is not angles:
            half = angles[:, 0, 0, : angles.shape[3] // 2]
            self._angles, self._tables = angles, (half.cos(), half.sin())
        return self._tables


class RATSelfAttention(SelfAttention):
    """Self-attention over recurrent keys and values, with an output gate.

    The fused projection also yields the forget gate. Its rows are laid out per query group, groups outermost,
    ``[q | output gate | k | v | forget gate]``, so that tensor parallelism shards it, and checkpoints reshard it, as it stands. All of
    the recurrence is local to a rank's own heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        rotary_tables: RotaryTables | None = None,
    ):
        if not config.attention_output_gate:
            raise ValueError("RATSelfAttention needs attention_output_gate=True: RAT+ gates the output of its attention")
        forget_gate_width = config.kv_channels * config.num_query_groups

        def linear_qkv(input_size, output_size, **kwargs):
            return submodules.linear_qkv(input_size, output_size + forget_gate_width, **kwargs)

        super().__init__(
            config=config,
            submodules=replace(submodules, linear_qkv=linear_qkv),
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        self.linear_qkv_out_dim += forget_gate_width
        self._angles: Tensor | None = None
        self._rotary_tables = rotary_tables or RotaryTables()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's Attention.forward, whose RoPE the scan takes over where it can: the keys then need no pass over memory for it."""
        refuse_packed_documents(packed_seq_params)
        self._angles = None
        of_queries, of_keys = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
        if of_keys is not None and of_keys is of_queries and self._scan_can_turn(of_keys):
            self._angles, rotary_pos_emb = of_keys, None
        output = super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        self._angles = None  # who calls get_query_key_value_tensors() alone applies RoPE too
        return output

    def _scan_can_turn(self, angles: Tensor) -> bool:
        """Whether angles [s, 1, 1, channels] are those of gated_scan's RoPE, and the whole sequence is here."""
        whole = angles.shape[1:] == (1, 1, self.hidden_size_per_attention_head) and not self.config.rotary_interleaved
        return whole and self._yarn_concentration_factor == 1.0 and self.pg_collection.cp.size() == 1

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, output_gate: bool = True, split_qkv: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden_states [s, b, h] -> query [s, b, np, hn], key and value [s, b, ng, hn] after the recurrence, output gate [s, b, np, hn].

        The caller applies RoPE, to the recurrent keys too, unless forward() left it to the scan.
        """
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        groups, hn = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query_width = self.num_attention_heads_per_partition // groups * hn
        mixed_qkv = mixed_qkv.unflatten(-1, (groups, -1))  # [s, b, ng, 2 * np/ng * hn + 3 * hn]
        if self.pg_collection.cp.size() > 1:
            query, gate, key, value = scan_mixed_qkv_context_parallel(mixed_qkv, query_width, self.pg_collection.cp)
        else:
            query, gate, key, value = scan_mixed_qkv(mixed_qkv, query_width, *self._cos_and_sin(len(mixed_qkv)))
        query = query.reshape(*query.shape[:2], -1, hn)  # [s, b, ng, np/ng * hn] -> [s, b, np, hn]
        gate = gate.reshape(*gate.shape[:2], -1, hn)
        return query, key, value, gate

    def _cos_and_sin(self, length: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of the angles that forward() left to the scan, [s, hn / 2] each."""
        if self._angles is None:
            return None, None
        cos, sin = self._rotary_tables.of(self._angles)
        return cos[:length], sin[:length]
