"""RAT+ self-attention: Megatron's SelfAttention whose keys and values first pass through a gated recurrence.

Source: arXiv 2602.18196, the RAT+ layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from rat_megatron.ops.gated_scan import gated_scan
from rat_megatron.parallel.context_parallel import gated_scan_context_parallel


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

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, output_gate: bool = True, split_qkv: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden_states [s, b, h] -> query [s, b, np, hn], key and value [s, b, ng, hn] after the recurrence, output gate [s, b, np, hn].

        RoPE is applied by the caller, to the recurrent keys.
        """
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        groups, hn = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query_width = self.num_attention_heads_per_partition // groups * hn
        mixed_qkv = mixed_qkv.unflatten(-1, (groups, -1))  # [s, b, ng, 2 * np/ng * hn + 3 * hn]
        query, gate, key, value, forget_gate = torch.split(mixed_qkv, [query_width, query_width, hn, hn, hn], dim=-1)
        if self.pg_collection.cp.size() > 1:
            key, value = gated_scan_context_parallel(forget_gate, key, value, self.pg_collection.cp)
        else:
            key, value, _ = gated_scan(forget_gate, key, value)
        query = query.reshape(*query.shape[:2], -1, hn)  # [s, b, ng, np/ng * hn] -> [s, b, np, hn]
        gate = gate.reshape(*gate.shape[:2], -1, hn)
        return query, key, value, gate
