"""The transformer configuration of a RAT+ model: Megatron's, with the two facts that RAT+ adds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal

from rat_megatron.ratplus.pattern import AttentionPattern


@dataclass
class RATTransformerConfig(TransformerConfig):
    """Megatron's TransformerConfig for RAT+ (arXiv 2602.18196); raises PatternError if the pattern does not fit the model."""

    rat_recurrence: bool = True
    """Keys and values pass through the gated recurrence. False is the plain-attention baseline, which keeps the output gate."""

    rat_pattern: str = "dense"
    """The attention pattern that the model starts with (rat_megatron.ratplus.pattern)."""

    attention_output_gate: bool = True

    def __post_init__(self):
        if self.output_layer_init_method is None:
            # RAT+ initialises every matrix alike; Megatron would scale the output projections down with depth.
            self.output_layer_init_method = init_method_normal(self.init_method_std)
        super().__post_init__()
        AttentionPattern.parse(self.rat_pattern).check(self.num_layers, self.num_attention_heads)
