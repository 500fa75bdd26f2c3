"""`rat-megatron prepare`: text into the samples that training reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders of .txt (one document each), .jsonl, .parquet or .arrow, text and JSONL also as .gz, .zst, .xz, .bz2; "
            "folders written by save_to_disk; hf://NAME or hf://NAME@REVISION, a data set of the Hugging Face Hub."
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder for train/, val/, tokenizer/ and rat_meta.json, or s3://, gs://, sftp://...")],
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
) -> None:
    """Turn text into token samples for training (MDS). The same command goes on where a killed run stopped."""
    from rat_megatron.data.prepare.pipeline import prepare as run

    run(
        inputs,
        output,
        tokenizer=tokenizer,
        seq_length=seq_length,
        workers=workers,
        val_fraction=val_fraction,
        eod_token=eod_token,
        text_column=text_column,
        answer_column=answer_column,
        seed=seed,
        deduplicate=deduplicate,
        subset=subset,
        split=split,
        work_dir=work_dir,
    )
