"""Loads an exported RAT+ folder for evaluation and generation, and says in one sentence what is wrong with one that cannot be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, on its device, and the folder's tokenizer, or None where there is none."""

    folder: Path
    model: RatPlusForCausalLM
    tokenizer: Any | None

    @property
    def config(self) -> RatPlusConfig:
        return self.model.config

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def need_tokenizer(self) -> Any:
        """The tokenizer; raises UserError where the folder has none."""
        if self.tokenizer is None:
            raise UserError(f"{self.folder} holds no tokenizer: convert the checkpoint again with --tokenizer, or copy its files there.")
        return self.tokenizer


def load_model(folder: Path, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Reads the model of ``rat-megatron convert to-hf`` onto ``device`` (default: the GPU if there is one), in ``dtype`` (float32,
    bfloat16, float16; default: as stored).

    Raises UserError for a folder that is missing, holds another kind of model, or whose weights or tokenizer are incomplete or do not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}.")
    place = _device(device)
    config = _read_config(folder)
    _check_weight_files(folder)
    tokenizer = _load_tokenizer(folder, config)
    try:
        model, info = RatPlusForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype] if dtype else "auto", output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, unknown to its config.json,"), ("mismatched_keys", "misfits")):
        if info.get(key):
            raise UserError(f"{folder} {what} the weight {sorted(map(str, info[key]))[0]}: copy or convert the model again.")
    return LoadedModel(folder, model.to(place).eval(), tokenizer)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {_first_line(error)}") from error


def _read_config(folder: Path) -> RatPlusConfig:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that `rat-megatron convert to-hf` wrote.")
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: give the folder that `rat-megatron convert to-hf` wrote.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): copy or convert the model again.") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != RatPlusConfig.model_type:
        raise UserError(
            f"{folder} holds a model of type {kind}, not {RatPlusConfig.model_type}: convert a RAT+ checkpoint with convert to-hf."
        )
    try:
        return RatPlusConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a RAT+ model: {_first_line(error)}") from error


def _check_weight_files(folder: Path) -> None:
    """Opens every safetensors file, whose header tells whether the file is whole."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} cannot be read ({_first_line(error)}): copy or convert the model again.") from error
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: copy or convert the model again.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): copy or convert the model again.") from error


def _load_tokenizer(folder: Path, config: RatPlusConfig) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} does not belong to the model: it has ids up to {largest}, the model a vocabulary of "
            f"{config.vocab_size}. Copy the tokenizer that the training data was made with there."
        )
    expected = getattr(config, "tokenizer_hash", None)
    if expected is not None and tokenizer_hash(tokenizer) != expected:
        raise UserError(
            f"the tokenizer in {folder} is not the one that the model was trained with: copy the tokenizer of the training data there."
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
