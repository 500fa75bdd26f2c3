"""The architecture of a RAT+ model in both languages: Megatron's arguments, as a checkpoint keeps them, and the Hugging Face config."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig
from rat_megatron.model.architecture import FIXED, SPEC, other_values


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
            attention_pattern=args.rat_pattern if pattern is None else pattern,
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            eos_token_id=getattr(args, "rat_eod_id", None),
            **_tokenizer_facts(args),
        )
    except AttributeError as error:
        raise UserError(f"{source} does not say its {error.name}: pretrain_rat.py did not write it") from error
    except ValueError as error:
        raise UserError(str(error)) from error


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
