"""Qwen3, dense: queries and keys normalized over each head, whose width is apart from the hidden size."""

from __future__ import annotations

from rat_megatron.convert.families.family import Config, Family, full_attention


def _options(config: Config) -> Config:
    full_attention({"use_sliding_window": False} | config)
    return {"qk_norm": "head", "head_dim": config.get("head_dim", 128)}


QWEN3 = Family("qwen3", "Qwen3", only={"hidden_act": "silu", "attention_bias": False}, options=_options)
