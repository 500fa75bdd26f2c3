"""`rat-megatron evaluate`: validation loss, tasks and needle tests of a model under several attention patterns, as JSON and plots."""

from __future__ import annotations

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rat_megatron.errors import UserError

if TYPE_CHECKING:
    from rat_megatron.evaluation.model import LoadedModel

_PACKAGES = ("rat-megatron", "torch", "transformers", "lm-eval")


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder that `rat-megatron convert to-hf` wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for results.json and the plots.")],
    *,
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
) -> dict[str, Any]:
    """Measure validation loss, benchmark tasks and needle tests per attention pattern, against the size of the KV cache."""
    # All input is checked and all questions are made before the first evaluation; results.json is written anew after each pattern, so that
    # a run that is stopped keeps what it has. It holds what is returned:
    #
    # {"model": {...}, "versions": {...}, "settings": {...}, "patterns": {word: {"kv_cache_bytes": {length: bytes}, "loss": {...},
    # "tasks": {task: {metric: value}}, "averages": {group: value}, "needles": {length: {kind: {...}}}}}}
    #
    # kv_cache_bytes is what a real cache holds of one sequence of that length. Imports are here because Transformers takes seconds.
    from rich.console import Console

    from rat_megatron.evaluation.loss import ValidationSet, validation_loss
    from rat_megatron.evaluation.model import load_model
    from rat_megatron.evaluation.needle_scores import NeedleTest
    from rat_megatron.evaluation.results import RESULTS_FILE, result_table, write_plots, write_results

    say = partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    if data is None and not task and not needle_length:
        raise UserError("nothing to evaluate: give --data, --task or --needle-length.")
    if (output / RESULTS_FILE).exists():
        raise UserError(f"{output / RESULTS_FILE} exists: give another --output, or remove it.")
    loaded = load_model(model, device=device, dtype=dtype)
    words = list(dict.fromkeys(str(loaded.config.parse_pattern(word)) for word in pattern or [loaded.config.attention_pattern]))
    settings = {"data": data, "num_samples": num_samples, "task_limit": task_limit, "seed": seed, "batch_size": batch_size}
    results: dict[str, Any] = {"model": _describe(loaded), "versions": _versions(), "settings": settings, "patterns": {}}

    validation = ValidationSet(data, loaded, num_samples=num_samples) if data is not None else None
    needles = [NeedleTest(loaded, length, count=needle_count, seed=seed) for length in sorted(set(needle_length or []))]
    suite = None
    if task:
        from rat_megatron.evaluation.tasks import TaskSuite, averages

        suite = TaskSuite(task, loaded, task_data=task_data, batch_size=batch_size)
    lengths = {test.length for test in needles} | ({validation.seq_length} if validation else set())
    lengths |= {loaded.config.max_position_embeddings} if suite else set()

    for word in words:
        loaded.model.set_attention_pattern(word)
        of_pattern: dict[str, Any] = {"kv_cache_bytes": {str(n): loaded.cache_bytes(n) for n in sorted(lengths)}}
        results["patterns"][word] = of_pattern
        if validation:
            say(f"{word}: validation loss of {validation.num_samples} samples of {validation.seq_length} tokens")
            of_pattern["loss"] = validation_loss(loaded, validation, batch_size=batch_size)
        for test in needles:
            say(f"{word}: needle tests at {test.length} tokens")
            of_pattern.setdefault("needles", {})[str(test.length)] = test.run(loaded, batch_size=batch_size)
        if suite:
            say(f"{word}: {', '.join(suite.names)}")
            of_pattern["tasks"] = suite.run(task_limit)
            of_pattern["averages"] = averages(of_pattern["tasks"])
        write_results(output, results)
    write_plots(output, results)
    Console().print(result_table(results))
    Console().print(f"Results and plots: {output}", markup=False, highlight=False, soft_wrap=True)
    return results


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    config = loaded.config
    return {
        "folder": str(loaded.folder),
        "parameters": loaded.model.num_parameters(),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "recurrence": config.use_recurrence,
        "attention_pattern": config.attention_pattern,
        "max_position_embeddings": config.max_position_embeddings,
        "dtype": loaded.dtype,
        "device": loaded.model.device.type,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # lm-eval is an extra
            continue
    return versions
