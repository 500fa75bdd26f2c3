"""`rat-megatron`: prepares data, converts checkpoints. What is heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rat_megatron.cli.convert import app as convert_app
from rat_megatron.cli.report import report
from rat_megatron.errors import exit_2_on_bad_input

app = typer.Typer(
    help="Prepare data for RAT+ language models and convert their checkpoints; training is pretrain_rat.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(convert_app, name="convert")
app.command(epilog="Example: rat-megatron report out --pretrained ckpt/base --adapted ckpt/d16 --adapted ckpt/d64")(report)


@app.command(epilog="Example: rat-megatron prepare fineweb/ --output data --tokenizer meta-llama/Llama-2-7b-hf --workers 64")
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Files or folders of .txt (one document each), .jsonl[.gz|.zst] or .parquet.")],
    output: Annotated[Path, typer.Option(help="Folder for train/, val/, tokenizer/ and rat_meta.json.")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face name, or a folder made by save_pretrained.")],
    seq_length: Annotated[int, typer.Option(help="Tokens of a sample, as in training.")] = 4096,
    workers: Annotated[int, typer.Option(help="Processes that tokenize; the result does not depend on it.")] = os.cpu_count() or 1,
    val_fraction: Annotated[float, typer.Option(help="Share of the documents held out for validation.")] = 0.005,
    eod_token: Annotated[str | None, typer.Option(help="Token that ends a document; default: the tokenizer's end of sequence.")] = None,
    text_column: Annotated[str, typer.Option(help="Column (Parquet) or field (JSONL) that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Decides, with the text itself, which documents are held out.")] = 1005,
) -> None:
    """Turn text into token samples for training (MDS). The same command goes on where a killed run stopped."""
    from rat_megatron.data.prepare import prepare as run

    run(
        inputs,
        output,
        tokenizer=tokenizer,
        seq_length=seq_length,
        workers=workers,
        val_fraction=val_fraction,
        eod_token=eod_token,
        text_column=text_column,
        seed=seed,
    )


def main() -> None:
    """The console script: bad input ends in one sentence and exit code 2."""
    with exit_2_on_bad_input():
        app()


if __name__ == "__main__":
    main()
