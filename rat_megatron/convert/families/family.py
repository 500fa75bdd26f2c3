"""What a family of models is to RAT+: how its config.json reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rat_megatron.errors import UserError

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of Transformers, whose weights have the names of RatPlusForCausalLM's: Llama's, which all of these took over.

    ``only`` are keys of config.json with the one value that is supported, as the model class has it where the key is missing. ``options``
    gives RatPlusConfig's arguments beyond those that all families share (``shared_options``).
    """

    model_type: str
    title: str
    only: dict[str, Any] = field(default_factory=dict)
    options: Callable[[Config], Config] = lambda config: {}


def ratplus_arguments(family: Family, config: Config) -> Config:
    """RatPlusConfig's arguments for a config.json of the family; raises UserError for a model that RAT+ does not have."""
    for key, value in family.only.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{family.title} with {key} {config[key]!r} is not supported, only {value!r}")
    try:
        return shared_options(config) | family.options(config)
    except KeyError as error:
        raise UserError(f"config.json does not say its {error.args[0]}") from error


def shared_options(config: Config) -> Config:
    """What config.json says in the words of Llama, whose keys all families here have."""
    theta, scaling = rope(config)
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
    return {name: config[name] for name in (*same, "max_position_embeddings")} | {
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "hidden_act": config["hidden_act"],
        "rope_theta": float(theta),
        "rotary_scaling": scaling,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        **{name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def rope(config: Config) -> tuple[float, Config | None]:
    """Base and scaling of RoPE, as Transformers 4 writes them or as 5 does."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    settings["rope_type"] = settings.pop("type", None) or settings.get("rope_type", "default")
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("a partial_rotary_factor is not supported in this family")
    return theta, None if settings["rope_type"] == "default" else settings


def full_attention(config: Config) -> None:
    """Raises UserError where layers attend within a window only."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or window >= config["max_position_embeddings"]:
        return
    raise UserError(
        f"its layers attend within a sliding_window of {window}, and only full attention is retrofitted: set sliding_window to null in "
        "config.json to give it that"
    )
