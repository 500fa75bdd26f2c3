"""`rat-megatron evaluate`: how good a model is under several attention patterns, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder that `rat-megatron convert to-hf` wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for results.json and the plots.")],
    pattern: Annotated[list[str] | None, typer.Option(help="Attention pattern; repeat for more. Default: the model's own.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of `rat-megatron prepare`: loss on its validation split.")] = None,
    num_samples: Annotated[int | None, typer.Option(min=1, help="Validation samples to use. Default: all.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="commonsense, longbench, ruler-niah, or a task of lm-evaluation-harness (install the extra eval); repeat."),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of local data, TASK.jsonl, .parquet, .arrow or a folder TASK of save_to_disk; else the Hub.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task. Default: all.")] = None,
    needle_length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a needle test, which needs no download; repeat.")
    ] = None,
    needle_count: Annotated[int, typer.Option(min=1, help="Questions of each kind and length.")] = 50,
    seed: Annotated[int, typer.Option(help="Decides the questions of the needle tests.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1... Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
) -> None:
    """Measure validation loss, benchmark tasks and needle tests per attention pattern, against the size of the KV cache."""
    from rich.console import Console

    from rat_megatron.evaluation.evaluate import evaluate as run
    from rat_megatron.evaluation.results import result_table

    progress = Console(stderr=True)
    results = run(
        model,
        output,
        patterns=pattern,
        data=data,
        num_samples=num_samples,
        tasks=task,
        task_data=task_data,
        task_limit=task_limit,
        needle_lengths=needle_length,
        needle_count=needle_count,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        report=lambda line: progress.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    Console().print(result_table(results))
    Console().print(f"Results and plots: {output}", markup=False, highlight=False, soft_wrap=True)
