"""Text -> MDS: tokenizes .txt, .jsonl and .parquet files into samples of T+1 token ids for `rat_megatron.data.streaming`.

The inputs are cut into units (byte ranges, row groups, groups of text files) that depend on the inputs alone. Worker processes turn
each unit into a file of token ids per split; one process then packs these, in input order, into MDS shards. All of it happens in
OUTPUT/.unfinished, every file appears by a rename, and OUTPUT/rat_meta.json comes last: a run killed at any moment goes on when started
again, its result does not depend on the interruption or on the number of workers, and unfinished data never looks complete.
Disk space needed while it runs: twice the token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from rat_megatron.data.documents import Unit, list_files, plan_units, read_documents
from rat_megatron.errors import UserError

FORMAT_VERSION = 1
META_FILE = "rat_meta.json"
SPLITS = ("train", "val")
UNFINISHED = ".unfinished"
SHARD_BYTES = 1 << 26
SHARD_SAMPLES = 1 << 16  # short samples: keep shards well below a shuffle block of the loader, which mixes whole shards
BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once
BLOCK_TOKENS = 1 << 24  # token ids held in memory while packing


@dataclass(frozen=True)
class PrepareReport:
    """Totals of the data set; `seconds` and `tokens_per_second` (of tokenizing) are of this call alone, 0 when all was there already."""

    documents: int
    tokens: int
    train_samples: int
    val_samples: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Settings:
    """All that decides the result besides the inputs; stored in rat_meta.json."""

    format_version: int
    seq_length: int
    vocab_size: int
    eod_id: int
    token_dtype: str  # uint16 | uint32
    tokenizer_name: str
    tokenizer_hash: str
    text_column: str
    val_fraction: float
    seed: int


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: str,
    seq_length: int,
    workers: int,
    val_fraction: float = 0.005,
    eod_token: str | None = None,
    text_column: str = "text",
    seed: int = 1005,
) -> PrepareReport:
    """Writes OUTPUT/{train,val} (MDS), OUTPUT/tokenizer and OUTPUT/rat_meta.json; prints documents, tokens and tokens/s.

    A sample is one column `tokens`: T+1 ids, the first being the last of the sample before. Each document ends with the end-of-document
    id, none begins with a special one, and special tokens spelled out in the text are encoded as ordinary text. So every token but the
    first of a split is predicted exactly once, except a tail of fewer than T tokens at the end of a split, which is dropped.
    Whether a document is held out depends on a hash of its text and `seed` alone: copies of a document fall on the same side.

    inputs: files or folders (searched recursively) of .txt (one document each), .jsonl, .jsonl.gz, .jsonl.zst, .parquet.
    tokenizer: a Hugging Face name or a local folder.
    Raises UserError for bad input, and when OUTPUT holds anything but this very data set, finished or not."""
    started = time.perf_counter()
    output = Path(output)
    _check_numbers(seq_length, workers, val_fraction)
    loaded = _load_tokenizer(tokenizer)
    settings = _settings(loaded, tokenizer, seq_length, eod_token, text_column, val_fraction, seed)
    files = list_files(inputs, excluded=output)
    inputs_hash = _hash([(file.name, file.path.stat().st_size) for file in files])

    finished = _finished_report(output, settings, inputs_hash)
    if finished is not None:
        return finished
    units = plan_units(files, text_column)
    work = output / UNFINISHED
    with _exclusive(output, work, settings):
        counts, rate = _tokenize(units, work, loaded, settings, workers)
        splits = {split: _split_totals(counts, split, seq_length) for split in SPLITS}
        tokens = sum(total["tokens"] for total in splits.values())
        if not splits["train"]["samples"]:
            shutil.rmtree(work)
            raise UserError(
                f"the inputs hold {tokens} tokens, too few for one training sample of --seq-length {seq_length}: give more text."
            )
        for split in SPLITS:
            _pack([work / f"{unit.key}.{split}" for unit in units], work / split, splits[split]["samples"], split, settings)
        shutil.rmtree(work / "tokenizer", ignore_errors=True)
        loaded.save_pretrained(work / "tokenizer")
        documents = sum(total["documents"] for total in splits.values())
        _publish(work, output, {**asdict(settings), "inputs_hash": inputs_hash, "documents": documents, "tokens": tokens, "splits": splits})
    seconds = time.perf_counter() - started
    print(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s, {seconds:.1f} s in all")
    print(f"{output}: {splits['train']['samples']:,} training and {splits['val']['samples']:,} validation samples of {seq_length} tokens")
    if val_fraction and not splits["val"]["samples"]:
        print(f"no validation split: --val-fraction {val_fraction} leaves fewer than {seq_length + 1} tokens for it")
    return PrepareReport(documents, tokens, splits["train"]["samples"], splits["val"]["samples"], seconds, rate)


# ---- settings and the state of the output folder -------------------------------------------------------------------------------------


def _check_numbers(seq_length: int, workers: int, val_fraction: float) -> None:
    if seq_length < 1:
        raise UserError(f"--seq-length {seq_length} must be at least 1.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1.")


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--tokenizer {name} cannot be loaded, give a Hugging Face name or a folder made by save_pretrained: {reason}"
        ) from error


def _settings(
    tokenizer: Any, name: str, seq_length: int, eod_token: str | None, text_column: str, val_fraction: float, seed: int
) -> Settings:
    vocabulary = tokenizer.get_vocab()
    if eod_token is not None and eod_token not in vocabulary:
        raise UserError(f"--eod-token {eod_token} is not in the vocabulary of --tokenizer {name}: choose one of its tokens.")
    eod_id = tokenizer.eos_token_id if eod_token is None else vocabulary[eod_token]
    if eod_id is None:
        raise UserError(f"--tokenizer {name} has no end-of-sequence token: name the token that ends a document with --eod-token.")
    vocab_size = max(len(tokenizer), max(vocabulary.values()) + 1)  # the second is larger when the vocabulary has holes
    return Settings(
        format_version=FORMAT_VERSION,
        seq_length=seq_length,
        vocab_size=vocab_size,
        eod_id=eod_id,
        token_dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        tokenizer_name=Path(name).resolve().name if Path(name).is_dir() else name,  # no path of this machine in the data set
        tokenizer_hash=_tokenizer_hash(tokenizer),
        text_column=text_column,
        val_fraction=val_fraction,
        seed=seed,
    )


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of what decides the ids: vocabulary, merges, normalization; not of names, paths or versions."""
    if not tokenizer.is_fast:
        return _hash(sorted(tokenizer.get_vocab().items()))
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return _hash({key: value for key, value in parts.items() if key not in ("version", "truncation", "padding")})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _finished_report(output: Path, settings: Settings, inputs_hash: str) -> PrepareReport | None:
    """The report of a data set that is complete already, or None."""
    if output.is_file():
        raise UserError(f"--output {output} is a file: give a folder.")
    if not (output / META_FILE).is_file():
        if output.is_dir() and not (output / UNFINISHED).is_dir() and any(output.iterdir()):
            raise UserError(f"--output {output} is not empty and was not written by this command: give another folder.")
        return None
    meta = json.loads((output / META_FILE).read_text())
    _compare(output, meta, {**asdict(settings), "inputs_hash": inputs_hash}, "already holds a data set made")
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)  # killed between its last two steps
    print(f"{output} is complete already: {meta['documents']:,} documents, {meta['tokens']:,} tokens; nothing to do")
    return PrepareReport(meta["documents"], meta["tokens"], meta["splits"]["train"]["samples"], meta["splits"]["val"]["samples"], 0.0, 0.0)


def _compare(output: Path, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    for name, value in wanted.items():
        if there.get(name) != value:
            change = "other input files" if name == "inputs_hash" else f"{name} {there.get(name)}, not {value}"
            raise UserError(f"--output {output} {what} with {change}: give another folder, or delete this one.")


@contextmanager
def _exclusive(output: Path, work: Path, settings: Settings) -> Iterator[None]:
    """Holds the unfinished folder of `output`: one run at a time, all with the same settings."""
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock", timeout=10)  # the workers of a killed run hold it until they notice
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to --output {output}: wait for it, or give another folder.") from None
    try:
        stored = work / "settings.json"
        if any(work.glob("*.train")):  # before the first unit is done, nothing is lost by other settings
            _compare(output, json.loads(stored.read_text()), asdict(settings), "holds an unfinished run")
        _write_json(stored, asdict(settings))
        yield
    finally:
        lock.release()


def _write_json(path: Path, value: Any) -> None:
    """Appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


# ---- tokenizing, in parallel ---------------------------------------------------------------------------------------------------------

_worker: tuple[Path, Any, Settings]  # set once in each worker process: the work folder, the tokenizer, the settings


def _tokenize(units: list[Unit], work: Path, tokenizer: Any, settings: Settings, workers: int) -> tuple[list[dict[str, Any]], float]:
    """Token files and counts of every unit, in the order of `units`, and the tokens per second of those that were missing."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    counts = {unit.key: json.loads(path.read_text()) for unit in units if (path := work / f"{unit.key}.json").is_file()}
    missing = [unit for unit in units if unit.key not in counts]
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_start_worker, initargs=(work, tokenizer, settings))
    try:
        futures = {pool.submit(_tokenize_unit, unit): unit for unit in missing}  # forks here, before the progress bar starts its thread
        columns = (TextColumn("tokenize"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns) as progress:
            total = sum(unit.size for unit in units)
            bar = progress.add_task("", total=total, completed=total - sum(unit.size for unit in missing))
            started, tokens, rate = time.perf_counter(), 0, 0.0
            for future in as_completed(futures):
                unit, count = futures[future], future.result()
                counts[unit.key] = count
                tokens += sum(count[split]["tokens"] for split in SPLITS)
                rate = tokens / (time.perf_counter() - started)
                progress.update(bar, advance=unit.size, description=f"{tokens:,} tokens, {rate:,.0f} tokens/s")
    finally:
        pool.shutdown(cancel_futures=True)
    return [counts[unit.key] for unit in units], rate


def _start_worker(work: Path, tokenizer: Any, settings: Settings) -> None:
    global _worker
    _worker = work, tokenizer, settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
    parent = parent_process()

    def exit_with_parent() -> None:  # a killed parent cannot tell its workers
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _tokenize_unit(unit: Unit) -> dict[str, Any]:
    """Writes KEY.train and KEY.val, flat token ids, then KEY.json, their counts, which says that both are whole."""
    work, tokenizer, settings = _worker
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    temporary = {split: work / f"{unit.key}.{split}.{os.getpid()}.tmp" for split in SPLITS}
    with open(temporary["train"], "wb") as train, open(temporary["val"], "wb") as val:
        files = {"train": train, "val": val}
        for texts in _batches(read_documents(unit, settings.text_column)):
            for text, ids in zip(texts, _encode(tokenizer, texts), strict=True):
                split = "val" if _is_held_out(text, settings) else "train"
                files[split].write(np.array([*ids, settings.eod_id], dtype=settings.token_dtype).tobytes())
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids) + 1
    for split in SPLITS:
        os.replace(temporary[split], work / f"{unit.key}.{split}")
    _write_json(work / f"{unit.key}.json", counts)
    return counts


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids without any special token: a document that spells out the end-of-document token does not end there."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer  # a quarter faster than through Transformers, which also computes offsets
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_held_out(text: str, settings: Settings) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(settings.seed).encode()).digest()
    return int.from_bytes(digest, "big") < settings.val_fraction * 2**64


# ---- packing, in one process ---------------------------------------------------------------------------------------------------------


def _split_totals(counts: list[dict[str, Any]], split: str, seq_length: int) -> dict[str, int]:
    documents = sum(count[split]["documents"] for count in counts)
    tokens = sum(count[split]["tokens"] for count in counts)
    return {"documents": documents, "tokens": tokens, "samples": max(0, tokens - 1) // seq_length}


def _pack(token_files: list[Path], folder: Path, samples: int, split: str, settings: Settings) -> None:
    """Writes the ids of all files, one after the other, as MDS samples; no folder when there is not a single sample."""
    from rich.progress import Progress
    from streaming import MDSWriter

    shutil.rmtree(folder, ignore_errors=True)  # packing starts anew after an interruption: it is quick beside tokenizing
    if not samples:
        return
    length = settings.seq_length
    encoding = f"ndarray:{settings.token_dtype}:{length + 1}"
    size_limit = min(SHARD_BYTES, SHARD_SAMPLES * (length + 1) * np.dtype(settings.token_dtype).itemsize)
    carry = np.empty(0, settings.token_dtype)
    writer = MDSWriter(columns={"tokens": encoding}, out=str(folder), hashes=["xxh64"], size_limit=size_limit)
    with writer, Progress() as progress:
        bar = progress.add_task(f"pack {split}", total=samples)
        for block in _blocks(token_files, settings.token_dtype):
            ids = np.concatenate([carry, block])
            complete = max(0, len(ids) - 1) // length
            for start in range(0, complete * length, length):
                writer.write({"tokens": ids[start : start + length + 1]})
            carry = ids[complete * length :]  # begins with the last token of the last sample
            progress.update(bar, advance=complete)


def _blocks(token_files: list[Path], dtype: str) -> Iterator[np.ndarray]:
    for path in token_files:
        with open(path, "rb") as file:
            while len(block := np.fromfile(file, dtype, BLOCK_TOKENS)):
                yield block


def _publish(work: Path, output: Path, meta: dict[str, Any]) -> None:
    """Moves the parts to their place, rat_meta.json last, and removes the unfinished folder."""
    for name in (*SPLITS, "tokenizer"):
        shutil.rmtree(output / name, ignore_errors=True)  # ours: a run killed inside this loop left it
        if (work / name).is_dir():
            os.rename(work / name, output / name)
    _write_json(output / META_FILE, meta)
    shutil.rmtree(work)
