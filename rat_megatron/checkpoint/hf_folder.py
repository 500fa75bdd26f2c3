"""Reads a Hugging Face folder of a RAT+ model tensor by tensor, and finds what is wrong with it before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def expected_shapes(config: RatPlusConfig) -> dict[str, torch.Size]:
    """Name and shape of every weight that a model with this config stores; without the output projection when it is tied."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in RatPlusForCausalLM(config).named_parameters()}


class HfFolder:
    """A folder with config.json and safetensors, whole and matching: ``config``, and ``dtypes`` of every weight the model stores.

    Raises UserError for another kind of model, missing or truncated files, and weights that are not those of the config.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_config(path)
        self.shapes = expected_shapes(self.config)
        self._files = _find_weights(path)
        self.dtypes = self._check_weights()

    def read(self, name: str, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """A weight, or some of its rows, not to be written to. Only what is read of the file stays in memory, as long as it is used."""
        with _open(self._files[name]) as file:
            weight = file.get_slice(name)
            if isinstance(rows, slice):
                return weight[rows]
            return torch.cat([weight[row : row + 1] for row in rows.tolist()])

    def _check_weights(self) -> dict[str, torch.dtype]:
        if self.config.tie_word_embeddings and HEAD in self._files:
            if not torch.equal(self.read(HEAD), self.read(EMBEDDING)):
                raise UserError(f"{self.path} has its own {HEAD}, but its config.json says tie_word_embeddings: true; correct one of them")
            del self._files[HEAD]
        if missing := sorted(self.shapes.keys() - self._files.keys()):
            raise UserError(f"{self.path} has no {missing[0]}, which its config.json asks for ({len(missing)} missing): copy it anew")
        if unknown := sorted(self._files.keys() - self.shapes.keys()):
            raise UserError(f"{self.path} holds {unknown[0]}, which the model of its config.json does not have: correct config.json")
        dtypes = {}
        for path in dict.fromkeys(self._files.values()):
            with _open(path) as file:
                for name in (name for name, place in self._files.items() if place == path):
                    weight = file.get_slice(name)
                    if tuple(weight.get_shape()) != tuple(self.shapes[name]):
                        shapes = f"{tuple(weight.get_shape())} for {name}, but its config.json says {tuple(self.shapes[name])}"
                        raise UserError(f"{self.path} has {shapes}: correct config.json")
                    if weight.get_dtype() not in _DTYPES:
                        raise UserError(f"{path} stores {name} as {weight.get_dtype()}: give a model in float32, bfloat16 or float16")
                    dtypes[name] = _DTYPES[weight.get_dtype()]
        return dtypes


def _read_config(path: Path) -> RatPlusConfig:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give one that 'rat-megatron convert' or save_pretrained wrote")
    try:
        values = json.loads((path / "config.json").read_text())
        model_type = values.get("model_type")
    except FileNotFoundError:
        raise UserError(f"{path} has no config.json: give a folder that 'rat-megatron convert' or save_pretrained wrote") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path / 'config.json'} is damaged: {error}") from error
    if model_type != RatPlusConfig.model_type:
        raise UserError(f"{path} holds a model of type '{model_type}' (config.json), not '{RatPlusConfig.model_type}': give a RAT+ model")
    try:
        config = RatPlusConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} describes no RAT+ model: {error}") from error
    if config.hidden_act != "gelu":
        raise UserError(f"{path / 'config.json'} has hidden_act '{config.hidden_act}': a RAT+ model has 'gelu'")
    return config


def _find_weights(path: Path) -> dict[str, Path]:
    """The file of every stored weight, as the files themselves say; an index must agree with them."""
    if not (path / INDEX).is_file():
        return dict.fromkeys(_names(path / SINGLE), path / SINGLE)
    try:
        listed = {name: path / file for name, file in json.loads((path / INDEX).read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path / INDEX} is damaged: {error}") from error
    there = {name: file for file in dict.fromkeys(listed.values()) for name in _names(file)}
    for name, file in listed.items():
        if there.get(name) != file:
            raise UserError(f"{path / INDEX} says that {name} is in {file.name}, where it is not: copy the folder anew")
    return listed


def _names(file: Path) -> list[str]:
    with _open(file) as opened:
        return list(opened.keys())


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the folder anew (weights must be safetensors)") from None
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy it anew") from error
