"""The configuration of a RAT+ model: Megatron's, with the two facts that RAT+ adds, and how it follows from the arguments."""

from __future__ import annotations

import inspect
from argparse import Namespace
from dataclasses import dataclass

from megatron.core.models.common.language_module import language_module
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from rat_megatron.model.layer_spec import get_rat_block_spec
from rat_megatron.ratplus.pattern import AttentionPattern


@dataclass
class RATTransformerConfig(TransformerConfig):
    """Megatron's TransformerConfig for RAT+ (arXiv 2602.18196); raises PatternError if the pattern does not fit the model or training."""

    rat_recurrence: bool = True
    """Keys and values pass through the gated recurrence. False is the plain-attention baseline, which keeps the output gate."""

    rat_pattern: str = "dense"
    """The attention pattern that the model starts with (rat_megatron.ratplus.pattern)."""

    rat_gate_bias: bool = False
    """Forget and output gate have a bias, also where queries, keys and values have none (``add_qkv_bias`` gives one to all)."""

    rat_qk_layernorm_over_heads: bool = False
    """The norms of queries and keys (``qk_layernorm``) are over all heads at once, as in OLMo2, not over each."""

    rat_norm_after: bool = False
    """The norms of a layer stand behind its attention and its MLP, as in OLMo2, not before them."""

    normalization: str = "RMSNorm"
    add_bias_linear: bool = False
    attention_dropout: float = 0.0
    attention_output_gate: bool = True

    def __post_init__(self):
        if self.output_layer_init_method is None:
            # RAT+ initialises every matrix alike; Megatron would scale the output projections down with depth.
            self.output_layer_init_method = init_method_normal(self.init_method_std)
        super().__post_init__()
        if self.rat_qk_layernorm_over_heads and not self.qk_layernorm:
            raise ValueError("rat_qk_layernorm_over_heads says how qk_layernorm is computed: set that too")
        pattern = AttentionPattern.parse(self.rat_pattern)
        pattern.check(self.num_layers, self.num_attention_heads)
        pattern.check_trainable()


def rat_model_config_from_args(args: Namespace) -> GPTModelConfig:
    """The model configuration for validated Megatron arguments; its builder makes GPTModel chunks with RAT+ layers."""
    config = gpt_config_from_args(args, config=core_transformer_config_from_args(args, RATTransformerConfig))
    config.rope_scaling_factor = args.rope_scaling_factor  # Megatron leaves this out, and would scale by 8
    config.transformer.use_te_rng_tracker = args.te_rng_tracker  # Megatron leaves this out, and refuses CUDA graphs then
    if args.cuda_graph_impl == "full_iteration":  # Megatron waits for the device after an exchange between stages, which no graph can hold
        config.transformer.batch_p2p_sync = False
    of_te = args.transformer_impl == "transformer_engine" and not args.fp16  # it takes bf16 and fp32
    if of_te and not args.cross_entropy_loss_fusion and not args.deterministic_mode and te_cross_entropy_is_sound():
        config.transformer.cross_entropy_loss_fusion, config.transformer.cross_entropy_fusion_impl = True, "te"
    if config.transformer_layer_spec is None:  # --spec wins
        config.transformer_layer_spec = get_rat_block_spec
    return config


def te_cross_entropy_is_sound() -> bool:
    """Whether Transformer Engine's fused cross-entropy keeps its gradient in fp32 until it is whole.

    Megatron 0.19 refuses --cross-entropy-fusion-impl te for training that diverged: earlier versions rounded the gradient to bf16 in
    between (TransformerEngine#3193). The version that came with the remedy and less memory (#3273) takes ``overwrite_input``.
    """
    if language_module.te_parallel_cross_entropy is None:
        return False
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return "overwrite_input" in inspect.signature(parallel_cross_entropy).parameters
