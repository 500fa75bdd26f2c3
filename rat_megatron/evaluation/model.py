"""Loads an exported RAT+ folder for evaluation and generation, and says in one sentence what is wrong with one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rat_megatron.checkpoint.hf_folder import HfFolder, parse_dtype
from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError, one_line
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME

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
        """What generate() fills up rows with that have ended; what comes after the end is cut by decode."""
        tokenizer = self.need_tokenizer()
        return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)

    def need_tokenizer(self) -> Any:
        """The tokenizer; raises UserError where the folder has none."""
        if self.tokenizer is None:
            raise UserError(f"{self.folder} holds no tokenizer: convert the checkpoint again with --tokenizer, or copy its files there.")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids without a beginning-of-text token, as in training."""
        return self.need_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.inference_mode()
    def continue_greedily(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """What the model writes after each prompt, as one batch."""
        rows, device = [self.encode(prompt) for prompt in prompts], self.model.device
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)  # [b, s], padded on the left
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self.pad_token_id}
        output = self.model.generate(ids, attention_mask=mask, **options)
        return self.need_tokenizer().batch_decode(output[:, longest:], skip_special_tokens=True)

    @torch.inference_mode()
    def cache_bytes(self, length: int) -> int:
        """What a real cache of one sequence of ``length`` tokens holds under the model's current attention pattern."""
        tokens = torch.randint(self.config.vocab_size, (1, length), device=self.model.device)
        return getattr(self.model(tokens, use_cache=True, logits_to_keep=1), CACHE_NAME).nbytes

    def description(self) -> dict[str, Any]:
        """What results say about the model."""
        config = self.config
        return {
            "folder": str(self.folder),
            "parameters": self.model.num_parameters(),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "recurrence": config.use_recurrence,
            "attention_pattern": config.attention_pattern,
            "max_position_embeddings": config.max_position_embeddings,
            "dtype": self.dtype,
            "device": self.model.device.type,
        }


def load_model(folder: Path, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Reads the model of ``rat-megatron convert to-hf`` onto ``device`` (default: the GPU if there is one), in ``dtype`` (float32,
    bfloat16, float16; default: as stored).

    Raises UserError for a folder that is missing, holds another kind of model, or whose weights or tokenizer are incomplete or do not fit.
    """
    wanted, place = parse_dtype(dtype, "float32", "bfloat16", "float16"), _device(device)
    config = HfFolder(folder).config
    tokenizer = _load_tokenizer(folder, config)
    try:
        model = RatPlusForCausalLM.from_pretrained(folder, config=config, dtype=wanted or "auto")
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
