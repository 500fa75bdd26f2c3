"""A small model with a tokenizer of bytes in a folder, for the tests of `rat-megatron evaluate` and `generate`."""

from __future__ import annotations

from pathlib import Path

import torch

from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM
from tests.preparing import EOD, save_byte_tokenizer


def save_tiny_model(folder: Path, *, tokenizer: bool = True, **overrides) -> Path:
    """Two layers of random weights, large enough that attention patterns differ and what is generated varies; vocabulary 257."""
    sizes = {"vocab_size": EOD + 1, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = RatPlusForCausalLM(RatPlusConfig(**{**sizes, "eos_token_id": EOD, **overrides}))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder)
    if tokenizer:
        save_byte_tokenizer(folder)
    return folder
