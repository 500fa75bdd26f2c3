"""SmolLM3: every fourth layer without RoPE."""

from __future__ import annotations

from rat_megatron.convert.families.family import Config, Family, full_attention


def _options(config: Config) -> Config:
    full_attention({"use_sliding_window": False} | config)
    layers, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    has_rope = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]
    return {
        "layers_without_rope": [layer for layer, turned in enumerate(has_rope) if not turned],
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


SMOLLM3 = Family("smollm3", "SmolLM3", only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, options=_options)
