"""Units of text -> files of token ids, in worker processes: KEY.train and KEY.val, flat ids, and KEY.json, their counts, which comes last
and says that they are whole. With --deduplicate each has a KEY.SPLIT.index of one record per document (`INDEX_TYPE`).

With --answer-column, for fine-tuning, every document is a sample of its own (`sample_type`), and with --messages-column every answer of a
conversation (`chat.py`); only the answer counts in the loss: prompt, answer and the end-of-document id, filled up with that id to T+1
tokens. Prompt and answer are tokenized apart, so that the prompt's ids are those of the prompt alone, as an evaluation gives it to the
model; a space between the two must be in the text of one. Special tokens of a chat template are kept, the end-of-document token among
them: the column `answer` says where such a sample ends. Several documents never share a sample: RAT+'s recurrence does not reset at their
ends, so that one would see the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rat_megatron.data.format import ANSWER_TYPE, SPLITS
from rat_megatron.data.prepare.chat import Chat
from rat_megatron.data.prepare.documents import Unit, read_documents, retrying
from rat_megatron.data.prepare.pool import run_in_workers
from rat_megatron.data.prepare.settings import Settings
from rat_megatron.errors import UserError
from rat_megatron.files import write_json

BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once
INDEX_TYPE = np.dtype([("first", "<u8"), ("second", "<u8"), ("tokens", "<u8")])  # the text's hash in two words, its ids with the last one
ARRAY_TYPES = {"uint16": "H", "uint32": "I"}  # a list becomes an array faster through `array` than through numpy


type Context = tuple[Path, Any, Settings, Chat | None]


@dataclass(frozen=True)
class Part:
    """The token ids of one unit and split. `documents` and `tokens` count what is kept, all but the documents numbered `dropped`;
    `too_long` documents were never written."""

    tokens_file: Path
    index_file: Path
    documents: int
    tokens: int
    dropped: np.ndarray  # [dropped] ascending
    too_long: int = 0


def sample_type(settings: Settings) -> np.dtype:
    """A sample, with answers or without: its fields are the columns of the MDS shards."""
    answer = [("answer", ANSWER_TYPE, (2,))] if settings.has_answers else []
    return np.dtype([("tokens", settings.token_dtype, (settings.seq_length + 1,)), *answer])


def tokenize(units: list[Unit], work: Path, tokenizer: Any, settings: Settings, workers: int) -> tuple[dict[str, list[Part]], float]:
    """For each split its parts in the order of `units`, and the tokens per second of the units that had not been done before."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    counts = {unit.key: json.loads(path.read_text()) for unit in units if (path := work / f"{unit.key}.json").is_file()}
    missing = [unit for unit in units if unit.key not in counts]
    chat = Chat(tokenizer, settings) if settings.messages_column is not None else None
    done = run_in_workers(tokenize_unit, (work, text_tokenizer(tokenizer, settings), settings, chat), missing, workers)
    columns = (TextColumn("tokenize"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    started, tokens, rate = time.perf_counter(), 0, 0.0
    total = sum(unit.size for unit in units)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=total, completed=total - sum(unit.size for unit in missing))
        for unit, count in done:
            counts[unit.key] = count
            tokens += sum(count[split]["tokens"] for split in SPLITS)
            rate = tokens / (time.perf_counter() - started)
            progress.update(bar, advance=unit.size, description=f"{tokens:,} tokens, {rate:,.0f} tokens/s")
    none = np.empty(0, np.int64)

    def part(unit: Unit, split: str) -> Part:
        return Part(work / f"{unit.key}.{split}", work / f"{unit.key}.{split}.index", **counts[unit.key][split], dropped=none)

    return {split: [part(unit, split) for unit in units] for split in SPLITS}, rate


def text_tokenizer(tokenizer: Any, settings: Settings) -> Any:
    """What `tokenize_unit` takes: the tokenizer's fast backend, a quarter faster than through Transformers, which also computes offsets; a
    slow tokenizer as it is. Raises UserError where special tokens are to be kept and a slow tokenizer cannot tell the last one apart."""
    keeps_all = settings.special_tokens == "keep" and settings.has_answers
    if not tokenizer.is_fast:
        if settings.special_tokens == "keep" and not keeps_all:
            raise UserError("--special-tokens keep needs a fast tokenizer (tokenizer.json): give one with --tokenizer, or leave it out.")
        return tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:  # a special one is what `encode_special_tokens` makes ordinary text of
        token["special"] = token["id"] == settings.eod_id or (token["special"] and settings.special_tokens == "split")
    backend = Tokenizer.from_str(json.dumps(parts | {"truncation": None, "padding": None}))  # else every document is cut and filled up
    backend.encode_special_tokens = not keeps_all
    return backend


def tokenize_unit(context: Context, unit: Unit) -> dict[str, Any]:
    """Writes the files of one unit; its counts. The context has the work folder, the `text_tokenizer`, the settings and a Chat.

    A unit of the Hub is tried several times: nothing of a failed attempt stays."""
    return retrying(unit.files[0], _write_unit, context, unit)


def _write_unit(context: Context, unit: Unit) -> dict[str, Any]:
    work, tokenizer, settings, chat = context
    counts = {split: {"documents": 0, "tokens": 0, "too_long": 0} for split in SPLITS}
    names = [*SPLITS, *(f"{split}.index" for split in SPLITS if settings.deduplicate)]
    temporary = {name: work / f"{unit.key}.{name}.{os.getpid()}.tmp" for name in names}
    read = read_documents(unit, settings.columns)
    batches = _batches(chat.answers(read) if chat else read)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(path, "wb")) for name, path in temporary.items()}
        for documents in _read_ahead(batches) if unit.is_remote else batches:
            encoded = zip(*(_encode(tokenizer, list(texts), settings) for texts in list(zip(*documents, strict=True))[:2]), strict=True)
            for texts, ids in zip(documents, encoded, strict=True):
                text = texts[-1 if chat else 0].encode()
                split = "val" if _is_held_out(text, settings) else "train"
                tokens = sum(map(len, ids)) + 1  # with the end-of-document id
                if settings.has_answers and tokens > settings.seq_length + 1:
                    counts[split]["too_long"] += 1
                    continue
                files[split].write(_stored(ids, settings))
                if settings.deduplicate:
                    digest = hashlib.blake2b(text, digest_size=16, key=b"".join(map(_digest, texts[1:]))).digest()
                    files[f"{split}.index"].write(digest + tokens.to_bytes(8, "little"))
                counts[split]["documents"] += 1
                counts[split]["tokens"] += tokens
    for name, path in temporary.items():
        os.replace(path, work / f"{unit.key}.{name}")
    write_json(work / f"{unit.key}.json", counts)
    return counts


def _stored(ids: tuple[list[int], ...], settings: Settings) -> bytes:
    """The ids of one document, of its prompt and answer where there are two, as they are written."""
    if settings.has_answers:
        return _answer_record(ids[0], ids[1], settings).tobytes()
    return array(ARRAY_TYPES[settings.token_dtype], [*ids[0], settings.eod_id]).tobytes()


def _answer_record(prompt: list[int], answer: list[int], settings: Settings) -> np.ndarray:
    """The sample of one document, a scalar of `sample_type`. Prompt and answer have at most T tokens together."""
    record = np.empty((), sample_type(settings))
    end = len(prompt) + len(answer)
    record["tokens"][:end] = prompt + answer
    record["tokens"][end:] = settings.eod_id
    record["answer"] = len(prompt), end + 1
    return record


def _encode(tokenizer: Any, texts: list[str], settings: Settings) -> Iterable[list[int]]:
    """Ids without any special token that the texts do not spell out: those of `generate`, where it is to be kept."""
    if isinstance(tokenizer, Tokenizer):
        return (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    split = settings.special_tokens == "split"
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]


def _batches(documents: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    batch, size = [], 0
    for texts in documents:
        batch.append(texts)
        size += sum(map(len, texts))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_ahead(batches: Iterator[list[tuple[str, ...]]]) -> Iterator[list[tuple[str, ...]]]:
    """Reads the next batch while one is tokenized, so that the network is not waited for."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is_held_out(text: bytes, settings: Settings) -> bool:
    """By the text, the prompt alone or how a conversation begins: all answers to one question are on the same side."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(settings.seed).encode()).digest()
    return int.from_bytes(digest, "big") < settings.val_fraction * 2**64
