"""`rat-megatron`: data, checkpoints, evaluation. The commands are functions of the rooms they belong to, whose imports are light, so that
--help is quick."""

from __future__ import annotations

from typing import Any

import typer

from rat_megatron.cli.doctor import doctor
from rat_megatron.convert.from_hf import convert_from_hf
from rat_megatron.convert.from_reference import convert_from_reference
from rat_megatron.convert.to_hf import convert_to_hf
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import exit_2_on_bad_input
from rat_megatron.evaluation.evaluate import evaluate
from rat_megatron.evaluation.generate import generate
from rat_megatron.training.monitoring.comparison import compare_runs


def _show(result: Any) -> None:
    """What a conversion returns says what it did."""
    from rich.console import Console

    Console().print(str(result), markup=False, highlight=False, soft_wrap=True)


convert = typer.Typer(
    name="convert",
    help="Convert checkpoints to and from other formats.",
    no_args_is_help=True,
    rich_markup_mode=None,
    result_callback=_show,
)
app = typer.Typer(
    help="Prepare data for RAT+ language models, convert and evaluate their checkpoints; training is pretrain_rat.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(convert)

for group, name, function, example in (
    (app, "prepare", prepare, "hf://HuggingFaceFW/fineweb --subset sample-10BT --output data --tokenizer gpt2"),
    (convert, "to-hf", convert_to_hf, "runs/rat-1.5b exported/rat-1.5b --pattern d16 --dtype bfloat16"),
    (convert, "from-hf", convert_from_hf, "exported/rat-1.5b runs/rat-1.5b-again"),
    (convert, "from-reference", convert_from_reference, "rat-1.5b.pth exported/rat-1.5b --tokenizer llama-2"),
    (app, "report", compare_runs, "out --pretrained ckpt/base --adapted ckpt/d16 --adapted ckpt/d64"),
    (app, "evaluate", evaluate, "exported/rat-1.5b --pattern dense --pattern d16 --data data --task piqa --output scores"),
    (app, "generate", generate, 'exported/rat-1.5b "The moon is" --pattern d16s4'),
    (app, "doctor", doctor, ""),
):
    command = f"rat-megatron {'convert ' if group is convert else ''}{name} {example}".rstrip()
    group.command(name, epilog=f"Example: {command}")(function)


def main() -> None:
    """The console script: bad input ends in one sentence and exit code 2."""
    with exit_2_on_bad_input():
        app()


if __name__ == "__main__":
    main()
