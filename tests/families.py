"""Tiny random models of the families that become RAT+ models, made with Transformers."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama3": LlamaConfig(**SIZES, rope_theta=500000.0, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=12),
    "qwen2.5": Qwen2Config(**SIZES, rope_theta=1e6, rope_scaling=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, rope_theta=1e6, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**SIZES, rope_theta=500000.0),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
}


def write_model(name: str, folder, dtype: torch.dtype = torch.float32) -> None:
    """Saves a model of the family whose every weight matters."""
    generator = torch.Generator().manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    for weight_name, parameter in model.named_parameters():
        shift, scale = (1.0, 0.2) if "norm" in weight_name else (0.0, 0.1)
        parameter.data = (shift + scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
    model.save_pretrained(folder)
