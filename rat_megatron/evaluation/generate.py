"""`rat-megatron generate`: streams a continuation or a conversation to the terminal, and says how fast it was and how large its cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from rat_megatron.errors import UserError

if TYPE_CHECKING:
    from rat_megatron.evaluation.generator import Generator


def generate(
    model: Annotated[Path, Argument(help="Folder that `rat-megatron convert to-hf` wrote.")],
    prompt: Annotated[str | None, Argument(help="Text to continue. Default, or with -: standard input.")] = None,
    *,
    pattern: Annotated[str | None, Option(help="Attention pattern, such as d16w256s4. Default: the model's own.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, Option(help="0 is greedy; 1 draws from the model's own distribution.")] = 0.0,
    top_p: Annotated[float, Option(help="Draw from the most likely tokens that have this probability together.")] = 1.0,
    seed: Annotated[int | None, Option(help="Makes what is drawn repeatable.")] = None,
    chat: Annotated[bool, Option("--chat", help="A conversation: every line of standard input is a turn.")] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1... Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
) -> None:
    """Continue a prompt. The text goes to standard output as it comes, speed and cache size to standard error.\f

    Raises UserError, also when a conversation has filled the model's positions, and Exit with 130 when Ctrl-C cut the text short.
    """
    if prompt is None and not chat and sys.stdin.isatty():
        raise UserError("there is no prompt: give PROMPT, or text on standard input.")
    if prompt is None or prompt == "-":
        prompt = "" if chat else sys.stdin.read().removesuffix("\n")
    from rat_megatron.evaluation.generator import Generator, Settings  # here because torch takes seconds, and --help should not
    from rat_megatron.evaluation.model import load_model

    settings = Settings(max_new_tokens, temperature, top_p, seed).check()
    if not chat and not prompt.strip():
        raise UserError("the prompt is empty: give some text as PROMPT or on standard input.")
    generator = Generator(load_model(model, device=device, dtype=dtype), settings, pattern)
    try:
        if chat:
            _converse(generator, prompt)
        else:
            generator.go_on(generator.loaded.encode(prompt))
    except KeyboardInterrupt:
        print(flush=True)
        raise Exit(130) from None  # as a shell says of a program that Ctrl-C ended
    finally:
        if generator.written:
            print(f"{generator.speed()}; {generator.cache_size()}", file=sys.stderr, flush=True)


def _converse(generator: Generator, first: str) -> None:
    """Answers ``first``, then every line of stdin until it ends.

    With a chat template, turns are messages; without one, every line goes on with the text so far.
    """
    encode, tokenizer = generator.loaded.encode, generator.tokenizer
    messages: list[dict[str, str]] = []
    so_far = ""  # the conversation as text, special tokens included
    for line in _lines(first):
        written = generator.written
        if tokenizer.chat_template is None:
            generator.go_on(written + encode(f"\n{line}\n" if written else f"{line}\n"))
            continue
        messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        goes_on = so_far and text.startswith(so_far)  # some templates change earlier turns; then all is read again
        ids = written + encode(text.removeprefix(so_far)) if goes_on else encode(text)
        messages.append({"role": "assistant", "content": generator.go_on(ids)})
        so_far = text + tokenizer.decode(generator.written[len(ids) :])


def _lines(first: str) -> Iterator[str]:
    """``first``, then the lines of stdin, those that are not blank, after a sign on stderr where someone is typing."""
    if first.strip():
        yield first
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
