"""A model of another family as a RAT+ model that computes the same: its weights, and gates that begin without effect.

Memory: x~_t = g x~_{t-1} + (1 - g) x_t, whose gate g is at first the same everywhere, as the projection to it is zero and its bias
log(g / (1 - g)). At g = 0 the model is the original exactly, but the gradient of a gate is in proportion to g, so training needs more.
Output gate: its projection is zero too, and what its bias makes of it is taken out of the projection that follows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from rat_megatron.checkpoint.hf_folder import HfFolder, find_weights, load_tokenizer, read_config
from rat_megatron.convert.families import FAMILIES
from rat_megatron.convert.families.family import Config, Family, ratplus_arguments
from rat_megatron.errors import UserError
from rat_megatron.files import write_json
from rat_megatron.hf import RatPlusConfig
from rat_megatron.ratplus.rotary_ratplus import rotary_tables

if TYPE_CHECKING:
    from rat_megatron.convert.megatron_weights import MegatronWeights

_NO_MEMORY = -100.0  # the sigmoid of which is 0 in fp32 next to 1
_OUTPUT_GATE = 4.0  # sigmoid 0.98: open, with a gradient
_MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts")


class RetrofittedFolder(HfFolder):
    """A Hugging Face folder of one of the FAMILIES, as if it were one of the RAT+ model that it becomes.

    ``memory``: the gate at first, from 0 (none) to below 1. Raises UserError for a family or a setting that is not supported, and where
    config.json and weights disagree.
    """

    def __init__(self, path: Path, memory: float, output_gate: bool):
        self.original = read_config(path)
        self.family = _family(self.original, path)
        self._bias = math.log(memory / (1 - memory)) if memory else _NO_MEMORY
        try:
            arguments = ratplus_arguments(self.family, self.original)
            config = RatPlusConfig(**arguments, use_output_gate=output_gate, gate_bias=True)
        except (UserError, ValueError) as error:
            raise UserError(f"{path} cannot become a RAT+ model: {error}") from error
        gates = {
            f"model.layers.{layer}.self_attn.{gate}_gate_proj.{kind}"
            for layer in range(config.num_hidden_layers)
            for gate in ("forget", "output")
            for kind in ("weight", "bias")
        }
        self._open(path, config, made=gates)
        self._dtype = next(iter(self.dtypes.values()))

    def read(self, name: str, rows: slice | Tensor = slice(None)) -> Tensor:
        if _is_of_a_gate(name):
            fill = 0.0 if name.endswith("weight") else _OUTPUT_GATE if "output_gate" in name else self._bias
            return torch.full(self.shapes[name], fill, dtype=self._dtype)[rows]
        weight = super().read(name, rows)
        if self.config.use_output_gate and name.endswith("self_attn.o_proj.weight"):
            weight = (weight.double() * (1 + math.exp(-_OUTPUT_GATE))).to(weight.dtype)
        return weight


def origin_of(source: RetrofittedFolder) -> dict[str, Any]:
    """What a checkpoint remembers of the model that it began as, to go back to it: plain data."""
    generation = source.path / "generation_config.json"
    return {
        "family": source.family.model_type,
        "config": source.original,
        "generation_config": json.loads(generation.read_text()) if generation.is_file() else None,
    }


def original_weights(weights: MegatronWeights, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model that it was: all but those of the gates."""
    if weights.config.use_output_gate:
        raise UserError("--without-memory: the model has an output gate, which its family does not")
    for name, weight in weights.hf_weights(dtype):
        if not _is_of_a_gate(name):
            yield name, weight


def write_original_configs(origin: dict[str, Any], config: RatPlusConfig, dtype: torch.dtype, folder: Path, tokenizer: Path | None) -> None:
    """config.json as it was, but for the angles of RoPE and the length where training changed them, tokenizer and generation config."""
    original, then = dict(origin["config"]), RatPlusConfig(**ratplus_arguments(FAMILIES[origin["family"]], origin["config"]))
    original |= {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in original}
    original["max_position_embeddings"] = config.max_position_embeddings
    at = torch.tensor([[1, then.max_position_embeddings]])  # Megatron's arguments may say the same scaling in more words
    if not all(map(torch.allclose, *(rotary_tables(at, each, torch.float64) for each in (then, config)))):
        scaling = config.rotary_scaling
        if "rope_parameters" in original:
            original["rope_parameters"] = {"rope_theta": config.rope_theta} | (scaling or {"rope_type": "default"})
        else:
            original |= {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    write_json(folder / "config.json", original)
    if origin["generation_config"]:
        write_json(folder / "generation_config.json", origin["generation_config"])
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(folder)


def _is_of_a_gate(name: str) -> bool:
    return ".self_attn.forget_gate_proj." in name or ".self_attn.output_gate_proj." in name


def _family(config: Config, path: Path) -> Family:
    kind = config.get("model_type")
    if any(config.get(name) for name in _MIXTURES):
        raise UserError(f"{path} is a mixture of experts ('{kind}'), and only dense models become RAT+: {_known()}")
    if kind not in FAMILIES:
        raise UserError(f"{path} has model_type '{kind}' in config.json, which is none of the families that become RAT+: {_known()}")
    return FAMILIES[kind]


def _known() -> str:
    return ", ".join(f"{family.title} ({kind})" for kind, family in FAMILIES.items())


@torch.no_grad()
def original_logits(path: Path, tokens: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor]:
    """Logits [t, vocab] of tokens [t] by the family's own model class in Transformers, in fp32, one layer's weights in memory at a time.

    ``dtypes`` is [None]: the weights are as they are stored.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight, device="meta"))  # apart where it is tied
    parts = [("model.embed_tokens", model.model.embed_tokens), ("model.norm", model.model.norm), (head, model.lm_head)]
    parts += [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
    files = find_weights(path)
    for name, module in parts:
        module.register_forward_pre_hook(_loading(files, name))
        module.register_forward_hook(lambda module, *_: module.to("meta") and None)
    return [model(tokens[None], use_cache=False).logits[0].float()]


def _loading(files: dict[str, Path], prefix: str) -> Callable[..., None]:
    """A hook that gives a module the weights that the files have under a prefix, in fp32."""

    def load(module: torch.nn.Module, *_: Any) -> None:
        state = {}
        for name in module.state_dict():
            with safe_open(files[f"{prefix}.{name}"], "pt") as file:
                state[name] = file.get_tensor(f"{prefix}.{name}").float()
        module.load_state_dict(state, assign=True)

    return load
