"""RAT+ self-attention: Megatron's SelfAttention whose keys and values first pass through a gated recurrence.

Source: arXiv 2602.18196, the RAT+ layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
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
    """Self-attention over recurrent keys and values, with an output gate unless the config says otherwise.

    The fused projection also yields the forget gate. Its rows are laid out per query group, groups outermost,
    ``[q | output gate | k | v | forget gate]``, so that tensor parallelism shards it, and checkpoints reshard it, as it stands. All of
    the recurrence is local to a rank's own heads. Norms of queries and keys, where there are some, come before the recurrence.
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
        forget_gate_width = config.kv_channels * config.num_query_groups
        gate_bias = getattr(config, "rat_gate_bias", False)

        def linear_qkv(input_size, output_size, *, bias, **kwargs):
            return submodules.linear_qkv(input_size, output_size + forget_gate_width, bias=bias or gate_bias, **kwargs)

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
        if gate_bias and not (config.add_qkv_bias or config.add_bias_linear):
            self._keep_bias_to_gates()
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
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:
            rotary_pos_emb = None  # as Megatron's own forward() says too late for us
        elif of_keys is not None and of_keys is of_queries and self._scan_can_turn(of_keys):
            self._angles, rotary_pos_emb = of_keys, None
        output = super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        self._angles = None  # who calls get_query_key_value_tensors() alone applies RoPE too
        return output

    def _keep_bias_to_gates(self) -> None:
        """Queries, keys and values have no bias: in the fused projection's it is zero, and gets no gradient."""
        hn, heads = self.hidden_size_per_attention_head, self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        widths = [heads * hn, heads * hn * self.config.attention_output_gate, hn, hn, hn]
        of_gate = torch.cat([torch.full((width,), gate) for width, gate in zip(widths, (0.0, 1.0, 0.0, 0.0, 1.0), strict=True)])
        bias = self.linear_qkv.bias
        self.register_buffer("_of_gates", of_gate.repeat(self.num_query_groups_per_partition).to(bias), persistent=False)
        bias.register_hook(lambda grad: grad * self._of_gates)

    def _scan_can_turn(self, angles: Tensor) -> bool:
        """Whether angles [s, 1, 1, channels] are those of gated_scan's RoPE, and the whole sequence is here."""
        whole = angles.shape[1:] == (1, 1, self.hidden_size_per_attention_head) and not self.config.rotary_interleaved
        return whole and self._yarn_concentration_factor == 1.0 and self.pg_collection.cp.size() == 1

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, output_gate: bool = True, split_qkv: bool = True
    ) -> tuple[Tensor, ...]:
        """hidden_states [s, b, h] -> query [s, b, np, hn], key and value [s, b, ng, hn] after the recurrence, and with an output gate that
        [s, b, np, hn].

        The caller applies RoPE, to the recurrent keys too, unless forward() left it to the scan.
        """
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        groups, hn = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query_width = self.num_attention_heads_per_partition // groups * hn
        mixed_qkv = mixed_qkv.unflatten(-1, (groups, -1))  # [s, b, ng, np/ng * hn + np/ng * hn + 3 * hn]
        if self.q_layernorm is not None:
            mixed_qkv = self._with_norms(mixed_qkv, query_width)
        gated = self.config.attention_output_gate
        if self.pg_collection.cp.size() > 1:
            query, gate, key, value = scan_mixed_qkv_context_parallel(mixed_qkv, query_width, self.pg_collection.cp, gated)
        else:
            angles = self._cos_and_sin(len(mixed_qkv))
            query, gate, key, value = scan_mixed_qkv(mixed_qkv, query_width, *angles, output_gate=gated)
        query = query.reshape(*query.shape[:2], -1, hn)  # [s, b, ng, np/ng * hn] -> [s, b, np, hn]
        if not gated:
            return query, key, value
        return query, key, value, gate.reshape(*gate.shape[:2], -1, hn)

    def _with_norms(self, mixed_qkv: Tensor, query_width: int) -> Tensor:
        """The projection [s, b, ng, ...] with its queries and keys normalized."""
        hn = self.hidden_size_per_attention_head
        query, gate, key, rest = mixed_qkv.split([query_width, query_width * self.config.attention_output_gate, hn, 2 * hn], dim=-1)
        normed = self.q_layernorm(query.reshape(*query.shape[:2], -1, hn)).view(query.shape)
        return torch.cat([normed, gate, self.k_layernorm(key.contiguous()), rest], dim=-1)

    def _cos_and_sin(self, length: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of the angles that forward() left to the scan, [s, hn / 2] each."""
        if self._angles is None:
            return None, None
        cos, sin = self._rotary_tables.of(self._angles)
        return cos[:length], sin[:length]
