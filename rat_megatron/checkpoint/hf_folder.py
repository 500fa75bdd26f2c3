"""Reads and writes Hugging Face folders of RAT+ models tensor by tensor; what is wrong with one is found before anything is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rat_megatron import ratplus
from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError, one_line
from rat_megatron.files import write_json
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}  # as Transformers
# What a causal model reads, whatever model the tokenizer was made for, and where its prompts are padded.
_TOKENIZER_SETTINGS: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"], "padding_side": "left"}
_AUTO_MAP = {
    "AutoConfig": "configuration_ratplus.RatPlusConfig",
    "AutoModel": "modeling_ratplus.RatPlusModel",
    "AutoModelForCausalLM": "modeling_ratplus.RatPlusForCausalLM",
    "AutoModelForSequenceClassification": "modeling_ratplus.RatPlusForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_ratplus.RatPlusForTokenClassification",
}


def expected_shapes(config: RatPlusConfig) -> dict[str, torch.Size]:
    """Name and shape of every weight that a model with this config stores; without the output projection when it is tied."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in RatPlusForCausalLM(config).named_parameters()}


class HfFolder:
    """A folder with config.json and safetensors, whole and matching: ``config``, and ``dtypes`` of every weight the model stores.

    Raises UserError for another kind of model, missing or truncated files, and weights that are not those of the config.
    """

    def __init__(self, path: Path):
        self._open(path, _read_config(path))

    def _open(self, path: Path, config: RatPlusConfig, made: Container[str] = ()) -> None:
        """``made``: weights of the model that are not in the folder."""
        self.path, self.config = path, config
        self.shapes = expected_shapes(config)
        self._stored = {name: shape for name, shape in self.shapes.items() if name not in made}
        self._files = {name: file for name, file in find_weights(path).items() if not name.endswith(".rotary_emb.inv_freq")}  # of old
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
        if missing := sorted(self._stored.keys() - self._files.keys()):
            raise UserError(f"{self.path} has no {missing[0]}, which its config.json asks for ({len(missing)} missing): copy it anew")
        if unknown := sorted(self._files.keys() - self._stored.keys()):
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


def write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_size: int) -> int:
    """Writes safetensors files of at most max_shard_size bytes (or one tensor), with an index when there are several; returns how many.

    One file's tensors are in memory at a time.
    """
    shard: dict[str, torch.Tensor] = {}
    files: list[tuple[Path, list[str]]] = []
    size = total = 0

    def flush() -> None:
        path = folder / f"part-{len(files)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors would keep it from everyone but its owner
        files.append((path, list(shard)))

    for name, weight in weights:
        if shard and size + weight.nbytes > max_shard_size:
            flush()
            shard.clear()
            size = 0
        shard[name] = weight
        size += weight.nbytes
        total += weight.nbytes
    flush()

    index: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        name = _SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        index |= dict.fromkeys(names, name)
    if len(files) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return len(files)


def write_configs(config: RatPlusConfig, folder: Path, tokenizer: Path | None, generation: dict[str, Any] | None = None) -> None:
    """Writes config, generation config, the model's code and the tokenizer, whose special ids fill those that the config lacks.

    ``generation``: generation_config.json of the model that this one was retrofitted from, which stays as it is.
    """
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer, **_TOKENIZER_SETTINGS)
        if getattr(config, "tokenizer_hash", None) not in (None, tokenizer_hash(loaded)):
            raise UserError(
                f"{tokenizer} is not the tokenizer that the training data was made with: give --tokenizer the folder of that one"
            )
        if loaded.pad_token is None:  # batches of prompts need one; the mask says which are padding
            loaded.pad_token = loaded.eos_token
        loaded.save_pretrained(folder)
        config.bos_token_id, config.pad_token_id = loaded.bos_token_id, loaded.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = loaded.eos_token_id
    config.architectures, config.auto_map = ["RatPlusForCausalLM"], dict(_AUTO_MAP)
    config.save_pretrained(folder)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig(**ids if generation is None else generation).save_pretrained(folder)
    for file in Path(ratplus.__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def load_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, **settings)
    except Exception as error:
        raise UserError(f"{folder} holds no tokenizer that Transformers can load: {one_line(error)}") from error


def parse_dtype(word: str | None, *choices: str) -> torch.dtype | None:
    """The dtype of this name, None for None; raises UserError unless it is one of the choices."""
    if word is not None and word not in choices:
        raise UserError(f"--dtype {word} is not one of {', '.join(choices)}")
    return getattr(torch, word) if word else None


def parse_size(word: str) -> int:
    """Bytes of a size such as 5GB or 500MB; raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", word.upper())
    if not match or float(match[1]) == 0:
        raise UserError(f"--max-shard-size {word} is no size: write 5GB, 500MB, ...")
    return int(float(match[1]) * _UNITS[match[2]])


def read_config(path: Path) -> dict[str, Any]:
    """What config.json says, whatever model it is of; raises UserError."""
    file = path / "config.json"
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give one that 'rat-megatron convert' or save_pretrained wrote")
    try:
        if not isinstance(values := json.loads(file.read_text()), dict):
            raise TypeError("it holds no object")
        return values
    except FileNotFoundError:
        raise UserError(f"{path} has no config.json: give a folder that 'rat-megatron convert' or save_pretrained wrote") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged or cannot be read: {one_line(error)}") from error


def _read_config(path: Path) -> RatPlusConfig:
    file, values = path / "config.json", read_config(path)
    model_type = values.get("model_type")
    if model_type != RatPlusConfig.model_type:
        raise UserError(f"{path} has model_type '{model_type}' in config.json: only '{RatPlusConfig.model_type}' is a RAT+ model")
    try:
        config = RatPlusConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} describes no RAT+ model: {one_line(error)}") from error
    return config


def find_weights(path: Path) -> dict[str, Path]:
    """The file of every stored weight, as the files themselves say; an index must agree with them."""
    if not (path / _INDEX).is_file():
        return dict.fromkeys(_names(path / _SINGLE), path / _SINGLE)
    try:
        listed = {name: path / file for name, file in json.loads((path / _INDEX).read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path / _INDEX} is damaged: {error}") from error
    there = {name: file for file in dict.fromkeys(listed.values()) for name in _names(file)}
    for name, file in listed.items():
        if there.get(name) != file:
            raise UserError(f"{path / _INDEX} says that {name} is in {file.name}, where it is not: copy the folder anew")
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
