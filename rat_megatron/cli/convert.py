"""``rat-megatron convert``: checkpoints from and to other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(name="convert", help="Convert checkpoints to and from other formats.", no_args_is_help=True, rich_markup_mode=None)

Output = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")]
Pattern = Annotated[str | None, typer.Option(help="Attention pattern, such as d16w256s4. Default: the one trained with.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as stored.")]
ShardSize = Annotated[str, typer.Option(help="Largest size of one safetensors file, such as 500MB; memory follows it.")]


@app.command(epilog="Example: rat-megatron convert to-hf runs/rat-1.5b exported/rat-1.5b --pattern d16 --dtype bfloat16")
def to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that Megatron's --save wrote, or one iteration in it.")],
    output: Output,
    iteration: Annotated[int | None, typer.Option(help="Iteration to convert. Default: the latest.")] = None,
    pattern: Pattern = None,
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder to include. Default: that of the training data.")] = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder that loads with trust_remote_code=True, without this package."""
    from rat_megatron.convert.to_hf import convert_to_hf  # here because Transformers takes seconds, and --help should not

    _show(
        convert_to_hf(checkpoint, output, pattern=pattern, dtype=dtype, step=iteration, tokenizer=tokenizer, max_shard_size=max_shard_size)
    )


@app.command(epilog="Example: rat-megatron convert from-hf exported/rat-1.5b runs/rat-1.5b-again")
def from_hf(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder of a RAT+ model.")],
    output: Output,
) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint, bit by bit; train on with --pretrained-checkpoint OUTPUT."""
    from rat_megatron.convert.from_hf import convert_from_hf

    _show(convert_from_hf(folder, output))


@app.command(epilog="Example: rat-megatron convert from-reference rat-1.5b.pth exported/rat-1.5b --tokenizer llama-2")
def from_reference(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the reference implementation (.pth). No code in it is run.")],
    output: Output,
    num_attention_heads: Annotated[int | None, typer.Option(help="Default: as many as are 128 wide.")] = None,
    max_position_embeddings: Annotated[int, typer.Option(help="Longest sequence the model was trained on.")] = 4096,
    pattern: Annotated[str, typer.Option(help="Attention pattern that the weights were adapted to, such as d16s4.")] = "dense",
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder to include.")] = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write a checkpoint of the reference implementation as a Hugging Face folder."""
    from rat_megatron.convert.from_reference import convert_from_reference

    _show(
        convert_from_reference(
            file,
            output,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=max_position_embeddings,
            pattern=pattern,
            dtype=dtype,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
        )
    )


def _show(report: Any) -> None:
    Console().print(str(report), markup=False, highlight=False, soft_wrap=True)
