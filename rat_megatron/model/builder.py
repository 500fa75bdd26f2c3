"""From Megatron's arguments to the configuration of a RAT+ GPTModel, which Megatron then builds."""

from __future__ import annotations

from argparse import Namespace

from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from rat_megatron.model.config import RATTransformerConfig
from rat_megatron.model.layer_spec import get_rat_block_spec


def rat_model_config_from_args(args: Namespace) -> GPTModelConfig:
    """The model configuration for validated Megatron arguments; its builder makes GPTModel chunks with RAT+ layers."""
    config = gpt_config_from_args(args, config=core_transformer_config_from_args(args, RATTransformerConfig))
    if config.transformer_layer_spec is None:  # --spec wins
        config.transformer_layer_spec = get_rat_block_spec
    return config
