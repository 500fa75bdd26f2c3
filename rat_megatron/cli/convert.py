"""``rat-megatron convert``: checkpoints from and to other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(name="convert", help="Convert checkpoints to and from other formats.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _convert() -> None:
    """Makes Typer keep the name of the command when there is only one."""


@app.command(epilog="Example: rat-megatron convert to-hf runs/rat-1.5b exported/rat-1.5b --pattern d16 --dtype bfloat16")
def to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that Megatron's --save wrote, or one iteration in it.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    iteration: Annotated[int | None, typer.Option(help="Iteration to convert. Default: the latest.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Attention pattern, such as d16w256s4. Default: the one trained with.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as stored.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder to include. Default: that of the training data.")] = None,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder that loads with trust_remote_code=True, without this package."""
    from rat_megatron.convert.to_hf import convert_to_hf  # here because Transformers takes seconds, and --help should not

    report = convert_to_hf(checkpoint, output, pattern=pattern, dtype=dtype, step=iteration, tokenizer=tokenizer)
    Console().print(str(report), markup=False, highlight=False, soft_wrap=True)
