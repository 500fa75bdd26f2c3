"""`rat-megatron`: data, checkpoints, evaluation. What is heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import typer

from rat_megatron.cli.doctor import doctor
from rat_megatron.convert import convert_average, convert_from_hf, convert_from_reference, convert_retrofit, convert_to_hf
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import exit_2_on_bad_input
from rat_megatron.evaluation.evaluate import evaluate
from rat_megatron.evaluation.generate import generate
from rat_megatron.training.monitoring.comparison import compare_runs

app = typer.Typer(
    help="Prepare data for RAT+ language models, convert and evaluate their checkpoints; training is pretrain_rat.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert = typer.Typer(help="Convert checkpoints to and from other formats, and average them.", no_args_is_help=True, result_callback=print)
convert.command("to-hf", epilog="Example: rat-megatron convert to-hf runs/rat-1.5b exported/rat-1.5b --pattern d16 --dtype bfloat16")(
    convert_to_hf
)
convert.command("retrofit", epilog="Example: rat-megatron convert retrofit models/SmolLM2-135M runs/smollm2")(convert_retrofit)
convert.command("from-hf", epilog="Example: rat-megatron convert from-hf exported/rat-1.5b runs/rat-1.5b-again")(convert_from_hf)
convert.command("from-reference", epilog="Example: rat-megatron convert from-reference rat-1.5b.pth exported/rat-1.5b --tokenizer llama-2")(
    convert_from_reference
)
convert.command("average", epilog="Example: rat-megatron convert average runs/rat-1.5b runs/rat-1.5b-average --last 5")(convert_average)

app.command(epilog="Example: rat-megatron prepare hf://HuggingFaceFW/fineweb --subset sample-10BT --output data --tokenizer gpt2")(prepare)
app.add_typer(convert, name="convert")
app.command("report", epilog="Example: rat-megatron report out --pretrained ckpt/base --adapted ckpt/d16 --adapted ckpt/d64")(compare_runs)
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
