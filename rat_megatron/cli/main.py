"""`rat-megatron`: data, checkpoints, evaluation. What is heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import typer

from rat_megatron.cli.convert import app as convert_app
from rat_megatron.cli.doctor import doctor
from rat_megatron.cli.evaluate import evaluate
from rat_megatron.cli.generate import generate
from rat_megatron.cli.report import report
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import exit_2_on_bad_input

app = typer.Typer(
    help="Prepare data for RAT+ language models, convert and evaluate their checkpoints; training is pretrain_rat.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog="Example: rat-megatron prepare hf://HuggingFaceFW/fineweb --subset sample-10BT --output data --tokenizer gpt2")(prepare)
app.add_typer(convert_app, name="convert")
app.command(epilog="Example: rat-megatron report out --pretrained ckpt/base --adapted ckpt/d16 --adapted ckpt/d64")(report)
app.command(
    epilog="Example: rat-megatron evaluate exported/rat-1.5b --pattern dense --pattern d16 --data data --task piqa --output scores"
)(evaluate)
app.command(epilog='Example: rat-megatron generate exported/rat-1.5b "The moon is" --pattern d16s4')(generate)
app.command(epilog="Example: rat-megatron doctor")(doctor)


def main() -> None:
    """The console script: bad input ends in one sentence and exit code 2."""
    with exit_2_on_bad_input():
        app()


if __name__ == "__main__":
    main()
