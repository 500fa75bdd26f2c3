"""Writes a Hugging Face folder of a RAT+ model: sharded safetensors, configs, the model's code, the tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from rat_megatron import ratplus
from rat_megatron.checkpoint.hf_folder import INDEX, SINGLE
from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError, one_line
from rat_megatron.hf import RatPlusConfig

MAX_SHARD_SIZE = "5GB"  # as Transformers
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}  # as Transformers
AUTO_MAP = {
    "AutoConfig": "configuration_ratplus.RatPlusConfig",
    "AutoModel": "modeling_ratplus.RatPlusModel",
    "AutoModelForCausalLM": "modeling_ratplus.RatPlusForCausalLM",
}


def parse_dtype(word: str | None) -> torch.dtype | None:
    """float32 or bfloat16, None for None; raises UserError."""
    if word is not None and word not in _DTYPES:
        raise UserError(f"--dtype {word} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[word] if word else None


def parse_size(word: str) -> int:
    """Bytes of a size such as 5GB or 500MB; raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", word.upper())
    if not match or float(match[1]) == 0:
        raise UserError(f"--max-shard-size {word} is no size: write 5GB, 500MB, ...")
    return int(float(match[1]) * _UNITS[match[2]])


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
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        index |= dict.fromkeys(names, name)
    if len(files) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / INDEX).write_text(text + "\n")
    return len(files)


def write_configs(config: RatPlusConfig, folder: Path, tokenizer: Path | None) -> None:
    """Writes config, generation config, the model's code and the tokenizer, whose special ids fill those that the config lacks."""
    if tokenizer is not None:
        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:
            raise UserError(f"{tokenizer} holds no tokenizer that Transformers can load: {one_line(error)}") from error
        if getattr(config, "tokenizer_hash", None) not in (None, tokenizer_hash(loaded)):
            raise UserError(
                f"{tokenizer} is not the tokenizer that the training data was made with: give --tokenizer the folder of that one"
            )
        loaded.save_pretrained(folder)
        config.bos_token_id, config.pad_token_id = loaded.bos_token_id, loaded.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = loaded.eos_token_id
    config.architectures, config.auto_map = ["RatPlusForCausalLM"], dict(AUTO_MAP)
    config.save_pretrained(folder)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig(**ids).save_pretrained(folder)
    for file in Path(ratplus.__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def check_tokenizer(tokenizer: Path | None) -> None:
    """Raises UserError when a folder was named that is none."""
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"--tokenizer {tokenizer} is not a folder")
