"""`rat-megatron evaluate`: validation loss, tasks and needle tests of a model under several attention patterns, as JSON and plots."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from rat_megatron.errors import UserError
from rat_megatron.evaluation.results import RESULTS_FILE, result_table, write_plots, write_results

_PACKAGES = ("rat-megatron", "torch", "transformers", "lm-eval")


def evaluate(
    model: Annotated[Path, Argument(help="Folder that `rat-megatron convert to-hf` wrote.")],
    output: Annotated[Path, Option(help="Folder for results.json and the plots.")],
    *,
    patterns: Annotated[list[str] | None, Option("--pattern", help="Attention pattern; repeat for more. Default: the model's own.")] = None,
    data: Annotated[str | None, Option(help="Folder of `rat-megatron prepare`: loss on its validation split.")] = None,
    num_samples: Annotated[int | None, Option(min=1, help="Validation samples to use. Default: all.")] = None,
    tasks: Annotated[
        list[str] | None,
        Option("--task", help="commonsense, longbench, ruler-niah, or a task of lm-evaluation-harness (install the extra eval); repeat."),
    ] = None,
    task_data: Annotated[
        Path | None, Option(help="Folder of local data, TASK.jsonl, .parquet, .arrow or a folder TASK of save_to_disk; else the Hub.")
    ] = None,
    task_limit: Annotated[int | None, Option(min=1, help="Documents of each task. Default: all.")] = None,
    needle_lengths: Annotated[
        list[int] | None, Option("--needle-length", min=1, help="Tokens of a needle test, which needs no download; repeat.")
    ] = None,
    needle_count: Annotated[int, Option(min=1, help="Questions of each kind and length.")] = 50,
    seed: Annotated[int, Option(help="Decides the questions of the needle tests.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Sequences at a time.")] = 1,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1... Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
) -> dict[str, Any]:
    """Measure validation loss, benchmark tasks and needle tests per attention pattern, against the size of the KV cache.\f

    All input is checked and all questions are made before the first evaluation; ``results.json`` is written anew after each pattern, so
    that a run that is stopped keeps what it has. Progress goes to stderr, the table of results to stdout. Returns the results:

    ``{"model": {...}, "versions": {...}, "settings": {...}, "patterns": {word: {"kv_cache_bytes": {length: bytes}, "loss": {...},
    "tasks": {task: {metric: value}}, "averages": {group: value}, "needles": {length: {kind: {...}}}}}}``

    ``kv_cache_bytes`` is what a real cache holds of one sequence of that length. A pattern that drops keys behind a prompt (SnapKV) has
    no loss, and of the tasks those whose answers are written: whatever is read at once is a prompt, and dense. Raises UserError for
    whatever is wrong with the input.
    """
    from rat_megatron.evaluation.loss import ValidationSet, validation_loss  # here because torch takes seconds, and --help should not
    from rat_megatron.evaluation.model import load_model
    from rat_megatron.evaluation.needles import NeedleTask
    from rat_megatron.evaluation.tasks import TaskSuite, averages

    if data is None and not tasks and not needle_lengths:
        raise UserError("nothing to evaluate: give --data, --task or --needle-length.")
    if (output / RESULTS_FILE).exists():
        raise UserError(f"{output / RESULTS_FILE} exists: give another --output, or remove it.")
    loaded = load_model(model, device=device, dtype=dtype)
    words = list(dict.fromkeys(str(loaded.config.parse_pattern(word)) for word in patterns or [loaded.config.attention_pattern]))
    settings = {"data": data, "num_samples": num_samples, "task_limit": task_limit, "seed": seed, "batch_size": batch_size}
    results: dict[str, Any] = {"model": loaded.description(), "versions": _versions(), "settings": settings, "patterns": {}}

    validation = ValidationSet(data, loaded, num_samples=num_samples) if data is not None else None
    needles = [NeedleTask(loaded, length, count=needle_count, seed=seed) for length in sorted(set(needle_lengths or []))]
    suite = TaskSuite(tasks, loaded, task_data=task_data, batch_size=batch_size) if tasks else None
    lengths = {task.length for task in needles} | ({validation.seq_length} if validation else set())
    lengths |= {loaded.config.max_position_embeddings} if suite else set()

    for word in words:
        loaded.model.set_attention_pattern(word)
        of_pattern: dict[str, Any] = {"kv_cache_bytes": {str(n): loaded.cache_bytes(n) for n in sorted(lengths)}}
        results["patterns"][word] = of_pattern
        pruned = loaded.config.parse_pattern(word).prunes_prompt
        if validation and pruned:
            _progress(f"{word}: no validation loss, as this pattern shows in what is generated only")
        elif validation:
            _progress(f"{word}: validation loss of {validation.num_samples} samples of {validation.seq_length} tokens")
            of_pattern["loss"] = validation_loss(loaded, validation, batch_size=batch_size)
        for task in needles:
            _progress(f"{word}: needle tests at {task.length} tokens")
            of_pattern.setdefault("needles", {})[str(task.length)] = task.run(loaded, batch_size=batch_size)
        if suite:
            names = suite.generated if pruned else suite.names
            if left_out := [name for name in suite.names if name not in names]:
                _progress(f"{word}: without {', '.join(left_out)}, as this pattern shows in what is generated only")
            if names:
                _progress(f"{word}: {', '.join(names)}")
            of_pattern["tasks"] = suite.run(names, task_limit)
            of_pattern["averages"] = averages(of_pattern["tasks"])
        write_results(output, results)
    write_plots(output, results)
    Console().print(result_table(results))
    print(f"Results and plots: {output}")
    return results


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # lm-eval is an extra
            continue
    return versions
