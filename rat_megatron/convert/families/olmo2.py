"""OLMo2: norms behind attention and MLP, queries and keys normalized over all heads at once."""

from __future__ import annotations

from rat_megatron.convert.families.family import Config, Family


def _options(config: Config) -> Config:
    return {"qk_norm": "layer", "norm_position": "after"}


OLMO2 = Family("olmo2", "OLMo2", only={"hidden_act": "silu", "attention_bias": False}, options=_options)
