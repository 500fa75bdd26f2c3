"""Llama 2 and 3, and what shares their classes, such as SmolLM2."""

from __future__ import annotations

from rat_megatron.convert.families.family import Family

# attention_bias would also give the output projection a bias.
LLAMA = Family("llama", "Llama", only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
