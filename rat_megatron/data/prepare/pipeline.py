"""Text -> MDS: turns documents into samples of T+1 token ids for `rat_megatron.data.loader.batches`.

The inputs (`inputs.py`) are cut into units that depend on the inputs alone (`documents.py`). Worker processes turn each unit into a file of
token ids per split (`tokenizing.py`), repeated documents are found (`duplicates.py`), and workers pack the ids, in input order, into MDS
shards (`packing.py`), which go to a folder or a store (`store.py`). Unfinished work stays in a folder of its own, where every file appears
by a rename, and rat_meta.json comes last: a run killed at any moment goes on when started again, its result does not depend on the
interruption or on the number of workers, and unfinished data never looks complete.
Disk space needed while it runs: twice the token ids; once, when the output is a store.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rat_megatron.data.format import INDEX_FILE, META_FILE, SPLITS, hash_of
from rat_megatron.data.prepare.inputs import list_files
from rat_megatron.data.prepare.settings import Settings, load_tokenizer, make_settings
from rat_megatron.data.prepare.store import Destination, open_destination
from rat_megatron.errors import UserError
from rat_megatron.files import write_json

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class PreparedData:
    """Totals of the data set; `seconds` and `tokens_per_second` (of tokenizing) are of this call alone, 0 when all was there already.

    `duplicates` are the documents left out as copies, `too_long` those whose prompt and answer are no sample; the other counts are
    without them."""

    documents: int
    tokens: int
    train_samples: int
    val_samples: int
    seconds: float
    tokens_per_second: float
    duplicates: int = 0
    too_long: int = 0


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders of .txt (one document each), .jsonl, .parquet or .arrow, text and JSONL also as .gz, .zst, .xz, .bz2; "
            "folders written by save_to_disk; hf://NAME or hf://NAME@REVISION, a data set of the Hugging Face Hub."
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder for train/, val/, tokenizer/ and rat_meta.json, or s3://, gs://, sftp://...")],
    *,
    tokenizer: Annotated[str, typer.Option(help="Hugging Face name, or a folder made by save_pretrained.")],
    seq_length: Annotated[int, typer.Option(help="Tokens of a sample, as in training.")] = 4096,
    workers: Annotated[int, typer.Option(help="Processes that tokenize; the result does not depend on it.")] = os.cpu_count() or 1,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents held out for validation.")] = 0.005,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep only the first of documents with the same text.")] = False,
    text_column: Annotated[str, typer.Option(help="Column or JSON field that holds the text.")] = "text",
    answer_column: Annotated[
        str | None, typer.Option(help="For fine-tuning: column of the answer to --text-column's prompt; only it counts in the loss.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a data set of the Hub, such as sample-100BT.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set that has several. Default: train.")] = None,
    eod_token: Annotated[str | None, typer.Option(help="Token that ends a document; default: the tokenizer's end of sequence.")] = None,
    seed: Annotated[int, typer.Option(help="Decides, with the text itself, which documents are held out.")] = 1005,
    work_dir: Annotated[
        Path | None, typer.Option(help="Local folder for unfinished work; needed when --output is a URL. Default: inside --output.")
    ] = None,
) -> PreparedData:
    """Turn text into token samples for training (MDS). The same command goes on where a killed run stopped."""
    # A sample is one column `tokens`: T+1 ids, the first being the last of the sample before. Each document ends with the end-of-document
    # id, none begins with a special one, and special tokens spelled out in the text are encoded as ordinary text. So every token but the
    # first of a split is predicted exactly once, except a tail of fewer than T tokens at the end of a split, which is dropped.
    # Whether a document is held out depends on a hash of its text and `seed` alone: copies of a document fall on the same side. With
    # `deduplicate` only the first of all documents with the same text is kept.
    #
    # With `answer_column` each document, a prompt (`text_column`) and its answer, is a sample of its own for fine-tuning, with a second
    # column that says where the answer is (`format.py`). Documents of more than T+1 tokens are left out and counted. The hash is then the
    # prompt's, and copies have the same prompt and answer.
    #
    # inputs: files, folders or hf://NAME[@REVISION], with `subset` and `split`: see `list_files`.
    # output: a folder, or the URL of a store; then unfinished work is kept in a folder of its own inside `work_dir`.
    # tokenizer: a Hugging Face name or a local folder.
    # Raises UserError for bad input, and when OUTPUT holds anything but this very data set, finished or not.
    from rat_megatron.data.prepare.documents import plan_units
    from rat_megatron.data.prepare.duplicates import drop_duplicates
    from rat_megatron.data.prepare.packing import pack, samples_in
    from rat_megatron.data.prepare.tokenizing import tokenize

    started = time.perf_counter()
    _check_numbers(seq_length, workers, val_fraction)
    if answer_column == text_column:
        raise UserError(f"--answer-column {answer_column} is the --text-column too: name the column with the prompt by --text-column.")
    loaded = load_tokenizer(tokenizer)
    settings = make_settings(
        loaded, tokenizer, eod_token=eod_token, seq_length=seq_length, text_column=text_column,
        val_fraction=val_fraction, seed=seed, deduplicate=deduplicate, answer_column=answer_column,
    )  # fmt: skip
    destination = open_destination(output, work_dir)
    files = list_files(inputs, Path(work_dir or output), subset, split)
    inputs_hash = hash_of([(file.name, file.size) for file in files])

    finished = _finished(destination, settings, inputs_hash)
    if finished is not None:
        return finished
    units = plan_units(files, settings.columns)
    with _exclusive(destination, settings):
        _write_tokenizer(loaded, destination)
        parts, rate = tokenize(units, destination.work, loaded, settings, workers)
        found, too_long = (sum(getattr(part, what) for split in SPLITS for part in parts[split]) for what in ("documents", "too_long"))
        if deduplicate:
            parts = {split: drop_duplicates(parts[split]) for split in SPLITS}
        splits = {
            split: {
                "documents": sum(part.documents for part in parts[split]),
                "tokens": sum(part.tokens for part in parts[split]),
                "samples": samples_in(parts[split], settings),
            }
            for split in SPLITS
        }
        documents, tokens = (sum(total[what] for total in splits.values()) for what in ("documents", "tokens"))
        if not splits["train"]["samples"]:
            shutil.rmtree(destination.work)
            few = f"{tokens} tokens, too few for one" if answer_column is None else f"{documents} documents that fit and none for a"
            long = f" ({too_long} have more than {seq_length + 1} tokens)" if too_long else ""
            raise UserError(f"the inputs hold {few} training sample of --seq-length {seq_length}{long}: give more text.")
        for split in SPLITS:
            pack(parts[split], split, settings, destination, workers)
        totals = {"documents": documents, "duplicates": found - documents, "too_long": too_long, "tokens": tokens, "splits": splits}
        destination.publish([*SPLITS, TOKENIZER], {**asdict(settings), "inputs_hash": inputs_hash, **totals})
    seconds = time.perf_counter() - started
    print(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s, {seconds:.1f} s in all")
    if deduplicate:
        print(f"{found - documents:,} of {found:,} documents were copies of an earlier one and are left out")
    if too_long:
        print(f"{too_long:,} more documents have over {seq_length + 1:,} tokens with their end, and are left out")
    train, val = (splits[split]["samples"] for split in SPLITS)
    print(f"{destination.shown}: {train:,} training and {val:,} validation samples of {seq_length} tokens")
    if val_fraction and not val:
        print(f"no validation split: --val-fraction {val_fraction} leaves fewer than {seq_length + 1} tokens for it")
    return _prepared(totals, seconds, rate)


def _check_numbers(seq_length: int, workers: int, val_fraction: float) -> None:
    if seq_length < 1:
        raise UserError(f"--seq-length {seq_length} must be at least 1.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1.")


def _prepared(meta: dict[str, Any], seconds: float, rate: float) -> PreparedData:
    train, val = (meta["splits"][split]["samples"] for split in SPLITS)
    return PreparedData(meta["documents"], meta["tokens"], train, val, seconds, rate, meta.get("duplicates", 0), meta.get("too_long", 0))


def _finished(destination: Destination, settings: Settings, inputs_hash: str) -> PreparedData | None:
    """The report of a data set that is complete already, or None."""
    address, output = destination.shown, Path(destination.address)
    meta = destination.read_json(META_FILE)
    if meta is not None:
        _compare(address, meta, {**asdict(settings), "inputs_hash": inputs_hash}, "already holds a data set made")
        shutil.rmtree(destination.work, ignore_errors=True)  # killed between its last two steps
        print(f"{address} is complete already: {meta['documents']:,} documents, {meta['tokens']:,} tokens; nothing to do")
        return _prepared(meta, 0.0, 0.0)
    if (destination.work / "settings.json").is_file():
        return None
    if destination.is_store:
        foreign = destination.read_json(f"train/{INDEX_FILE}") is not None
    else:
        foreign = output.is_dir() and not destination.work.is_dir() and any(output.iterdir())
    if foreign:
        raise UserError(f"--output {address} is not empty and was not written by this command: give another folder.")
    return None


def _compare(address: str, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    there = {"deduplicate": False, "answer_column": None, **there}  # older data sets do not say so
    for name, value in wanted.items():
        if there.get(name) != value:
            change = "other input files" if name == "inputs_hash" else f"{name} {there.get(name)}, not {value}"
            raise UserError(f"--output {address} {what} with {change}: give another folder, or delete this one.")


@contextmanager
def _exclusive(destination: Destination, settings: Settings) -> Iterator[None]:
    """Holds the folder of unfinished work: one run at a time, all with the same settings."""
    from filelock import FileLock, Timeout

    work = destination.work
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock", timeout=10)  # the workers of a killed run hold it until they notice
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to --output {destination.shown}: wait for it, or give another folder.") from None
    try:
        stored = work / "settings.json"
        if any(work.glob("*.train")):  # before the first unit is done, nothing is lost by other settings
            _compare(destination.shown, json.loads(stored.read_text()), asdict(settings), "holds an unfinished run")
        for path in work.glob("*.tmp"):  # of a killed run
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(stored, asdict(settings))
        yield
    finally:
        lock.release()


def _write_tokenizer(tokenizer: Any, destination: Destination) -> None:
    """First of all: so a store that cannot be written to is found before the work, not after it."""
    folder = destination.work / TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        destination.upload(f"{TOKENIZER}/{path.name}")
