"""Qwen2 and Qwen2.5: queries, keys and values with a bias."""

from __future__ import annotations

from rat_megatron.convert.families.family import Config, Family, full_attention


def _options(config: Config) -> Config:
    full_attention({"use_sliding_window": False} | config)
    return {"attention_bias": True}


QWEN2 = Family("qwen2", "Qwen2.5", only={"hidden_act": "silu"}, options=_options)
