"""The recipes of the RAT+ paper (arXiv 2602.18196) as values of Megatron's arguments.

A preset fills the flags that were not given on the command line. ``PRETRAIN`` and ``ADAPT`` differ in batch, steps and learning rate.
"""

from __future__ import annotations

from typing import Any

# What makes a model RAT+, whatever its size. Parameter names are Megatron's argument destinations.
MODEL: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "add_bias_linear": False,
    "attention_output_gate": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "bias_gelu_fusion": False,  # Megatron's fused GELU is the tanh approximation; RAT+ uses the exact one
}

_RECIPE: dict[str, Any] = {
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.05,
    "min_lr": 1e-6,
    "seed": 1005,
}

# With --optimizer muon. Momentum, Nesterov and scale are Moonlight's (arXiv 2502.16982): updates of 0.2 * sqrt(max(rows, columns)) times an
# orthogonal matrix have about the root mean square of AdamW's, whose learning rate and weight decay then hold. Megatron's coefficients
# bring singular values nearer to 1 than the first ones (kellerjordan.github.io/posts/muon).
MUON: dict[str, Any] = {
    "muon_momentum": 0.95,
    "muon_nesterov": True,
    "muon_scale_mode": "spectral",
    "muon_extra_scale_factor": 0.2,
    "muon_coefficient_type": "quintic",
    "muon_num_ns_steps": 5,
    "muon_tp_mode": "duplicated",  # whole matrices at any TP; blockwise would train another model at each
}


def _large(num_layers: int, hidden_size: int, num_attention_heads: int, micro_batch_size: int) -> dict[str, Any]:
    return _RECIPE | {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "ffn_hidden_size": 4 * hidden_size,
        "seq_length": 4096,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "micro_batch_size": micro_batch_size,
        "bf16": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "log_interval": 10,
        "log_throughput": True,
        "save_interval": 500,
        "eval_interval": 1000,
    }


_TINY = _RECIPE | {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 512,
    "seq_length": 256,
    "max_position_embeddings": 256,
    "vocab_size": 2048,
    "micro_batch_size": 8,
    "global_batch_size": 8,
    "log_interval": 10,
    "save_interval": 100,
    "eval_interval": 100,
    "eval_iters": 8,
}
_1_5B = _large(24, 2048, 16, micro_batch_size=2)
_2_6B = _large(28, 2560, 20, micro_batch_size=1)
_7_6B = _large(32, 4096, 32, micro_batch_size=1)

# eval_iters: validation on 524M tokens, the whole of the paper's held-out set.
PRETRAIN: dict[str, dict[str, Any]] = {
    "tiny": _TINY | {"lr": 4e-3, "train_iters": 150},
    "1.5b": _1_5B | {"global_batch_size": 512, "lr": 8e-4, "train_iters": 52452, "eval_iters": 250},
    "2.6b": _2_6B | {"global_batch_size": 640, "lr": 7e-4, "train_iters": 41961, "eval_iters": 200},
    "7.6b": _7_6B | {"global_batch_size": 768, "lr": 6e-4, "train_iters": 34968, "eval_iters": 166},
}

SIZES = tuple(PRETRAIN)
"""Presets that say how large the model is."""


def _retrofit(micro_batch_size: int, lr: float) -> dict[str, Any]:
    """Continued pretraining on 10B tokens. As long as in arXiv 2605.28640; the rest is our choice, as that recipe is not published."""
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size", "max_position_embeddings")
    recipe = {name: value for name, value in _large(0, 0, 0, micro_batch_size).items() if name not in sizes}
    return recipe | {"global_batch_size": 256, "lr": lr, "lr_warmup_fraction": 0.02, "train_iters": 9537, "rat_arl_pattern": "d64"}


# After rat-megatron convert retrofit, whose checkpoint has the model's sizes; a tenth to a third of the rates that such models begin with.
RETROFIT: dict[str, dict[str, Any]] = {
    "retrofit-135m": _retrofit(16, 3e-4),
    "retrofit-1b": _retrofit(4, 1e-4),
    "retrofit-8b": _retrofit(1, 3e-5),
}

_NO_WARMUP = {"lr_warmup_fraction": 0.0}
ADAPT: dict[str, dict[str, Any]] = {
    "tiny": _TINY | _NO_WARMUP | {"lr": 1e-3, "train_iters": 25},
    "1.5b": _1_5B | _NO_WARMUP | {"global_batch_size": 512, "lr": 8e-5, "train_iters": 476, "eval_iters": 250},
    "2.6b": _2_6B | _NO_WARMUP | {"global_batch_size": 640, "lr": 7e-5, "train_iters": 381, "eval_iters": 200},
    "7.6b": _7_6B | {"lr_warmup_fraction": 0.02} | {"global_batch_size": 768, "lr": 2e-5, "train_iters": 317, "eval_iters": 166},
}


def with_fixed_warmup(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its warmup in iterations, which does not change with the length of the run: it can then become longer."""
    warmup = round(recipe["lr_warmup_fraction"] * recipe["train_iters"])
    return {name: value for name, value in recipe.items() if name != "lr_warmup_fraction"} | {"lr_warmup_iters": warmup}


def wsd_decay(train_iters: int) -> dict[str, Any]:
    """The decay of --lr-decay-style WSD: 1 - sqrt over the last tenth of the run. MiniCPM (arXiv 2404.06395) decays over 10%; Hägele et al.
    (arXiv 2405.18392) find 1 - sqrt better than a line."""
    return {"lr_wsd_decay_style": "minus_sqrt", "lr_wsd_decay_iters": max(train_iters // 10, 1)}


def in_samples(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same recipe, of the same length, with samples counted in the place of iterations."""
    names = {"train_iters": "train_samples", "lr_warmup_iters": "lr_warmup_samples", "lr_wsd_decay_iters": "lr_wsd_decay_samples"}
    batch = recipe["global_batch_size"]
    return {names.get(name, name): value * batch if name in names else value for name, value in recipe.items()}
