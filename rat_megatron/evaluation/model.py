"""Loads an exported RAT+ folder for evaluation and generation, and says in one sentence what is wrong with one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rat_megatron.checkpoint.hf_folder import HfFolder
from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError, one_line
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME

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
        return self.model.config  # type: ignore[return-value]

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def pad_token_id(self) -> int:
        """What generate() may fill up rows with that have ended: the tokenizer's own token for it, or another whose rows are cut there."""
        tokenizer = self.need_tokenizer()
        return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)

    @torch.inference_mode()
    def cache_bytes(self, length: int) -> int:
        """What the cache of one sequence of ``length`` tokens holds under the model's current attention pattern: of a real one."""
        tokens = torch.randint(self.config.vocab_size, (1, length), device=self.model.device)
        return getattr(self.model(tokens, use_cache=True, logits_to_keep=1), CACHE_NAME).nbytes

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
    config = HfFolder(folder).config
    tokenizer = _load_tokenizer(folder, config)
    try:
        model = RatPlusForCausalLM.from_pretrained(folder, config=config, dtype=DTYPES[dtype] if dtype else "auto")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from error
    return LoadedModel(folder, model.to(place).eval(), tokenizer)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {one_line(error)}") from error


def _load_tokenizer(folder: Path, config: RatPlusConfig) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
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
