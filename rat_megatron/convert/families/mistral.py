"""Mistral, where it attends to all tokens before (from 7B v0.2 on)."""

from __future__ import annotations

from rat_megatron.convert.families.family import Config, Family, full_attention


def _options(config: Config) -> Config:
    full_attention({"sliding_window": 4096} | config)  # what the class has where the key is missing
    return {}


MISTRAL = Family("mistral", "Mistral", only={"hidden_act": "silu"}, options=_options)
