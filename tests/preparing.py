"""Helpers for the tests of `rat-megatron prepare`: a tokenizer of bytes, and what a finished data set says."""

import functools
import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from streaming import LocalDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rat_megatron.data.prepare.pipeline import prepare

EOD = 256


def save_byte_tokenizer(folder: Path, eos: bool = True) -> str:
    """One token a byte (ids in the order of the byte-level alphabet) and <|eod|>, id 256: a test can say which ids a text has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_special_tokens({"eos_token": "<|eod|>"} if eos else {"additional_special_tokens": ["<|eod|>"]})
    wrapped.save_pretrained(folder)
    return str(folder)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def samples_of(output: Path, split: str) -> np.ndarray:
    """[samples, T + 1]"""
    data = LocalDataset(str(output / split))
    return np.stack([data[index]["tokens"] for index in range(len(data))])


def stream_of(samples: np.ndarray) -> np.ndarray:
    """The tokens of a split in a row, each once."""
    assert (samples[1:, 0] == samples[:-1, -1]).all(), "successive samples share one token"
    return np.concatenate([samples[0, :1], samples[:, 1:].ravel()])


def documents_of(stream: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(stream, np.flatnonzero(stream == EOD) + 1) if len(part)]


def train_texts(output: Path, tokenizer: str) -> list[str]:
    """The documents of the training split, the last one perhaps cut."""
    decode = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    alphabet = {index: symbol for symbol, index in decode.get_vocab().items()}
    bytes_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    found = documents_of(stream_of(samples_of(output, "train")))
    return [bytes(bytes_of[alphabet[index]] for index in ids if index != EOD).decode(errors="ignore") for ids in found]


def _byte_symbols() -> list[str]:
    """The symbol of each byte in GPT-2's byte-level alphabet."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_until_killed(step: str, after: int, *arguments, victim: str = "main", **options) -> int:
    """Runs prepare in a fork, so that nothing heavy is imported again, in which the `after`-th call of a function kills with -9.

    step: MODULE.FUNCTION. victim: "main", or "worker" for the process that makes the call. Returns the exit code; 0 is the end of a run
    and 3 that of one which raised."""
    child = os.fork()
    if child == 0:
        try:
            module, name = step.rsplit(".", 1)
            main, calls, original = os.getpid(), itertools.count(), getattr(importlib.import_module(module), name)

            @functools.wraps(original)
            def killing(*args, **kwargs):
                if next(calls) == after:
                    os.kill(main if victim == "main" else os.getpid(), signal.SIGKILL)
                    signal.pause()  # until the death of the parent is noticed
                return original(*args, **kwargs)

            setattr(sys.modules[module], name, killing)
            prepare(*arguments, **options)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
