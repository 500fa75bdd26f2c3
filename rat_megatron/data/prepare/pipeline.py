"""`rat-megatron prepare`: turns documents into samples of T+1 token ids, as MDS, for `rat_megatron.data.loader.batches`.

The inputs (`inputs.py`) are cut into units that depend on the inputs alone (`documents.py`). Worker processes turn each unit into a file of
token ids per split (`tokenizing.py`), repeated documents are found (`duplicates.py`), and workers pack the ids, in input order, into MDS
shards (`packing.py`), which go to a folder or a store (`destination.py`). Unfinished work stays in a folder of its own, where every file
appears by a rename, and rat_meta.json comes last: a run killed at any moment goes on when started again, its result does not depend on the
interruption or on the number of workers, and unfinished data never looks complete.
Disk space needed while it runs: twice the token ids; once, when the output is a store.

A document ends with the end-of-document id and nowhere else, and none begins with a special one; other special tokens that are spelled out
in the text are ordinary text, unless they are kept. So every token but the first of a split is predicted exactly once, except a tail of
fewer than T tokens at its end, which is dropped. With answers, each document is a sample of its own instead, and those of more than T+1
tokens are left out and counted. Whether a document is held out depends on a hash of its text, or prompt, and the seed alone: copies of a
document fall on the same side.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rat_megatron.data.format import SPLITS, hash_of
from rat_megatron.data.prepare.inputs import list_files
from rat_megatron.data.prepare.settings import Settings, load_tokenizer, make_settings
from rat_megatron.errors import UserError

if TYPE_CHECKING:
    from rat_megatron.data.prepare.destination import Destination
    from rat_megatron.data.prepare.documents import Unit

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
    messages_column: Annotated[
        str | None,
        typer.Option(
            help="For fine-tuning on conversations: column of their messages, each with role and content. Every answer of the assistant is "
            "a sample behind what comes before it, in the tokenizer's chat template; only it counts in the loss."
        ),
    ] = None,
    special_tokens: Annotated[
        str | None,
        typer.Option(
            help="What special tokens are that are spelled out in the text: split makes them ordinary text, keep the tokens they name, "
            "except for the one that ends a document. Default: split; with --answer-column and --messages-column keep, that one too, as "
            "chat templates spell out turns and `generate --chat` reads them so. A document never ends but at its end."
        ),
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
    # Here, so that --help does not wait for numpy, pyarrow and the clients of the stores.
    from rat_megatron.data.prepare.destination import open_destination
    from rat_megatron.data.prepare.documents import plan_units

    started = time.perf_counter()
    special_tokens = special_tokens or ("split" if answer_column is None and messages_column is None else "keep")
    _check_flags(seq_length, workers, val_fraction, text_column, answer_column, messages_column, special_tokens)
    loaded = load_tokenizer(tokenizer)
    settings = make_settings(
        loaded, tokenizer, eod_token=eod_token, seq_length=seq_length, text_column=text_column,
        val_fraction=val_fraction, seed=seed, deduplicate=deduplicate, answer_column=answer_column, special_tokens=special_tokens,
        messages_column=messages_column,
    )  # fmt: skip
    with closing(open_destination(output, work_dir)) as destination:
        files = list_files(inputs, Path(work_dir or output), subset, split)
        facts = {**asdict(settings), "inputs_hash": hash_of([(file.name, file.size) for file in files])}
        if (meta := destination.finished(facts)) is not None:
            print(f"{destination.shown} is complete already: {meta['documents']:,} documents, {meta['tokens']:,} tokens; nothing to do")
            return _totals(meta, 0.0, 0.0)
        units = plan_units(files, settings.columns)
        with destination.exclusive(asdict(settings)):
            _write_tokenizer(loaded, destination)
            counts, rate = _write_samples(units, loaded, settings, destination, workers)
            destination.publish([*SPLITS, TOKENIZER], {**facts, **counts})
        totals = _totals(counts, time.perf_counter() - started, rate)
        _print(totals, settings, destination.shown)
    return totals


def _check_flags(
    seq_length: int, workers: int, val_fraction: float, text_column: str, answer_column: str | None, messages_column: str | None,
    special_tokens: str,
) -> None:  # fmt: skip
    if seq_length < 1:
        raise UserError(f"--seq-length {seq_length} must be at least 1.")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1.")
    if special_tokens not in ("keep", "split"):
        raise UserError(f"--special-tokens {special_tokens} is not known: give keep or split.")
    if answer_column == text_column:
        raise UserError(f"--answer-column {answer_column} is the --text-column too: name the column with the prompt by --text-column.")
    if messages_column is not None and answer_column is not None:
        raise UserError("--messages-column and --answer-column are two ways to name answers: give one.")
    if messages_column is not None and special_tokens == "split":
        raise UserError(
            "--special-tokens split would tear the tokens of the chat template apart that --messages-column needs: leave it out."
        )


def _write_tokenizer(tokenizer: Any, destination: Destination) -> None:
    """First of all: so a store that cannot be written to is found before the work, not after it."""
    folder = destination.work / TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        destination.upload(f"{TOKENIZER}/{path.name}")


def _write_samples(
    units: list[Unit], tokenizer: Any, settings: Settings, destination: Destination, workers: int
) -> tuple[dict[str, Any], float]:
    """Writes the shards of both splits; the counts of rat_meta.json, and the tokens per second of tokenizing."""
    from rat_megatron.data.prepare.duplicates import drop_duplicates
    from rat_megatron.data.prepare.packing import pack, samples_in
    from rat_megatron.data.prepare.tokenizing import tokenize

    parts, rate = tokenize(units, destination.work, tokenizer, settings, workers)
    found, too_long = (sum(getattr(part, what) for split in SPLITS for part in parts[split]) for what in ("documents", "too_long"))
    if settings.deduplicate:
        parts = {split: drop_duplicates(parts[split]) for split in SPLITS}
    splits = {
        split: {
            "documents": sum(part.documents for part in parts[split]),
            "tokens": sum(part.tokens for part in parts[split]),
            "samples": samples_in(parts[split], settings),
        }
        for split in SPLITS
    }
    documents, tokens = (sum(counts[what] for counts in splits.values()) for what in ("documents", "tokens"))
    if not splits["train"]["samples"]:
        shutil.rmtree(destination.work)
        few = f"{tokens} tokens, too few for one" if not settings.has_answers else f"{documents} documents that fit and none for a"
        long = f" ({too_long} have more than {settings.seq_length + 1} tokens)" if too_long else ""
        raise UserError(f"the inputs hold {few} training sample of --seq-length {settings.seq_length}{long}: give more text.")
    for split in SPLITS:
        pack(parts[split], split, settings, destination, workers)
    return {"documents": documents, "duplicates": found - documents, "too_long": too_long, "tokens": tokens, "splits": splits}, rate


def _totals(meta: dict[str, Any], seconds: float, rate: float) -> PreparedData:
    train, val = (meta["splits"][split]["samples"] for split in SPLITS)
    return PreparedData(meta["documents"], meta["tokens"], train, val, seconds, rate, meta.get("duplicates", 0), meta.get("too_long", 0))


def _print(totals: PreparedData, settings: Settings, address: str) -> None:
    sample = settings.seq_length + 1
    rate = f"{totals.tokens_per_second:,.0f} tokens/s, {totals.seconds:.1f} s in all"
    print(f"{totals.documents:,} documents, {totals.tokens:,} tokens, {rate}")
    if settings.deduplicate:
        found = totals.documents + totals.duplicates
        print(f"{totals.duplicates:,} of {found:,} documents were copies of an earlier one and are left out")
    if totals.too_long:
        print(f"{totals.too_long:,} more documents have over {sample:,} tokens with their end, and are left out")
    samples = f"{totals.train_samples:,} training and {totals.val_samples:,} validation samples"
    print(f"{address}: {samples} of {settings.seq_length} tokens")
    if settings.val_fraction and not totals.val_samples:
        print(f"no validation split: --val-fraction {settings.val_fraction} leaves fewer than {sample} tokens for it")
