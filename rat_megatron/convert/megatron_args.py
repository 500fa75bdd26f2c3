"""The architecture of a RAT+ model in both languages: Megatron's arguments, as a checkpoint keeps them, and the Hugging Face config."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig
from rat_megatron.model.architecture import FIXED, SPEC, other_values
from rat_megatron.ratplus.rotary_ratplus import attention_factor

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as Megatron has them


def config_from_args(args: Namespace, source: Path, pattern: str | None) -> RatPlusConfig:
    """The Hugging Face config of the model that Megatron's arguments describe; end-of-text is the document end that training used."""
    if not hasattr(args, "rat_recurrence"):
        raise UserError(f"{source} is not a RAT+ checkpoint: its arguments have no rat_recurrence, so pretrain_rat.py did not write it")
    for name, value, right in other_values(args):
        raise UserError(f"{source} was trained with {name}={value}: a RAT+ model has {name}={right}")
    if (spec := getattr(args, "spec", None)) not in (None, SPEC):
        raise UserError(f"{source} was trained with the layers of --spec {' '.join(spec)}: only RAT+ layers have a Hugging Face form")
    try:
        return RatPlusConfig(
            vocab_size=args.vocab_size or args.padded_vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            num_key_value_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            head_dim=args.kv_channels,
            intermediate_size=args.ffn_hidden_size,
            hidden_act="silu" if args.swiglu else "gelu",
            rms_norm_eps=args.layernorm_epsilon,
            rope_theta=float(args.rotary_base),
            max_position_embeddings=args.max_position_embeddings or args.seq_length,
            use_recurrence=args.rat_recurrence,
            use_output_gate=_of(args, "attention_output_gate", True),
            attention_bias=_of(args, "add_qkv_bias", False),
            gate_bias=_of(args, "rat_gate_bias", False) or _of(args, "add_qkv_bias", False),
            qk_norm=_qk_norm(args),
            norm_position="after" if _of(args, "rat_norm_after", False) else "before",
            rotary_percent=_of(args, "rotary_percent", 1.0),
            rotary_scaling=_rotary_scaling(args),
            layers_without_rope=_layers_without_rope(args),
            attention_pattern=args.rat_pattern if pattern is None else pattern,
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            eos_token_id=getattr(args, "rat_eod_id", None),
            **_tokenizer_facts(args),
        )
    except AttributeError as error:
        raise UserError(f"{source} does not say its {error.name}: pretrain_rat.py did not write it") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _of(args: Namespace, name: str, default: Any) -> Any:
    """An argument that checkpoints of earlier versions lack."""
    return getattr(args, name, default)


def _qk_norm(args: Namespace) -> str | None:
    if not _of(args, "qk_layernorm", False):
        return None
    return "layer" if _of(args, "rat_qk_layernorm_over_heads", False) else "head"


def _layers_without_rope(args: Namespace) -> list[int]:
    every = _of(args, "no_rope_freq", None)
    if isinstance(every, int):
        every = ([0] * (every - 1) + [1]) * (args.num_layers // every)
    return [layer for layer, without in enumerate(every or []) if without]


def _rotary_scaling(args: Namespace) -> dict[str, Any] | None:
    """In the words of Transformers' rope_scaling."""
    if _of(args, "position_embedding_type", "rope") == "yarn":
        factor = args.rotary_scaling_factor
        concentration = [1.0 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0 for scale in (args.mscale, args.mscale_all_dim)]
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": args.yarn_original_max_position_embeddings or 4096,  # Megatron's defaults
            "beta_fast": args.yarn_beta_fast or 32.0,
            "beta_slow": args.yarn_beta_slow or 1.0,
            "truncate": args.yarn_correction_range_round_to_int is not False,
            "attention_factor": concentration[0] / concentration[1],
        }
    if _of(args, "use_rope_scaling", False):
        return {"rope_type": "llama3", "factor": args.rope_scaling_factor, **_LLAMA3}
    if (factor := _of(args, "rotary_seq_len_interpolation_factor", None)) is not None:
        return {"rope_type": "linear", "factor": float(factor)}
    return None


def _scaling_args(config: RatPlusConfig, source: Path) -> dict[str, Any]:
    """Megatron's arguments of the config's rotary_scaling; raises UserError for one that Megatron does not have."""
    scaling = config.rotary_scaling
    args: dict[str, Any] = {"position_embedding_type": "rope", "use_rope_scaling": False, "rope_scaling_factor": 8.0}
    args["rotary_seq_len_interpolation_factor"] = None
    if scaling is None:
        return args
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "llama3":
        if different := {name: scaling[name] for name, value in _LLAMA3.items() if scaling[name] != value}:
            raise UserError(f"{source} scales RoPE with {different}, where Megatron has {_LLAMA3}")
        return args | {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
    if kind == "linear":
        if int(factor) != factor:
            raise UserError(f"{source} scales RoPE by {factor}, where Megatron has whole numbers (--rotary-seq-len-interpolation-factor)")
        return args | {"rotary_seq_len_interpolation_factor": int(factor)}
    return args | {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": float(factor),
        "mscale": (attention_factor(scaling) - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0,
        "mscale_all_dim": 0.0,
        "yarn_original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "yarn_beta_fast": float(scaling.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(scaling.get("beta_slow") or 1.0),
        "yarn_correction_range_round_to_int": scaling.get("truncate", True),
    }


def args_from_config(config: RatPlusConfig, dtype: torch.dtype, source: Path) -> Namespace:
    """Megatron's arguments as far as they describe the model: what config_from_args, training and Megatron's loader look at."""
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    return Namespace(
        **FIXED,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_key_value_heads != config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        swiglu=config.hidden_act == "silu",
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=int(config.rope_theta) if float(config.rope_theta).is_integer() else config.rope_theta,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        rat_recurrence=config.use_recurrence,
        attention_output_gate=config.use_output_gate,
        add_qkv_bias=config.attention_bias,
        rat_gate_bias=config.gate_bias and not config.attention_bias,
        qk_layernorm=config.qk_norm is not None,
        rat_qk_layernorm_over_heads=config.qk_norm == "layer",
        rat_norm_after=config.norm_position == "after",
        rotary_percent=config.rotary_percent,
        no_rope_freq=[int(layer in config.layers_without_rope) for layer in range(config.num_hidden_layers)]
        if config.layers_without_rope
        else None,
        **_scaling_args(config, source),
        rat_pattern=config.attention_pattern,
        rat_eod_id=config.eos_token_id,
        rat_tokenizer_path=str(source.resolve()) if has_tokenizer else None,
        rat_tokenizer_name=getattr(config, "tokenizer_name", None),
        rat_tokenizer_hash=getattr(config, "tokenizer_hash", None),
    )


def tokenizer_of_the_data(args: Namespace) -> Path | None:
    """The folder of the tokenizer that the training data was made with, where it is still there."""
    remembered = getattr(args, "rat_tokenizer_path", None)
    return Path(remembered) if remembered and Path(remembered).is_dir() else None


def _tokenizer_facts(args: Namespace) -> dict[str, Any]:
    """``tokenizer_name`` and ``tokenizer_hash`` of the training data, as `rat-megatron prepare` notes them, where they are known."""
    facts = {name: getattr(args, f"rat_{name}", None) for name in ("tokenizer_name", "tokenizer_hash")}
    return {name: value for name, value in facts.items() if value is not None}
