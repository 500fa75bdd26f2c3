"""`rat-megatron generate`: text from a model, in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rat_megatron.errors import UserError


def generate(
    model: Annotated[Path, typer.Argument(help="Folder that `rat-megatron convert to-hf` wrote.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue. Default, or with -: standard input.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Attention pattern, such as d16w256s4. Default: the model's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 1 draws from the model's own distribution.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that have this probability together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes what is drawn repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation: every line of standard input is a turn.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1... Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
) -> None:
    """Continue a prompt. The text goes to standard output as it comes, speed and cache size to standard error."""
    if prompt == "-" or (prompt is None and not chat):
        if sys.stdin.isatty() and prompt is None:
            raise UserError("there is no prompt: give PROMPT, or text on standard input.")
        prompt = None if chat else sys.stdin.read().removesuffix("\n")
    from rat_megatron.evaluation import generator

    settings = generator.Settings(max_new_tokens, temperature, top_p, seed)
    run = generator.converse if chat else generator.continue_prompt
    if not run(model, prompt, settings, pattern=pattern, device=device, dtype=dtype):
        raise typer.Exit(130)  # as a shell says of a program that Ctrl-C ended
