"""`rat-megatron evaluate`: validation loss, tasks and needle tests of a model under several attention patterns, as JSON and plots."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rat_megatron.errors import UserError
from rat_megatron.evaluation.loss import ValidationSet, validation_loss
from rat_megatron.evaluation.model import LoadedModel, load_model
from rat_megatron.evaluation.needle_scores import NeedleTest
from rat_megatron.evaluation.results import RESULTS_FILE, write_plots, write_results
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME

_PACKAGES = ("rat-megatron", "torch", "transformers", "lm-eval")


def evaluate(
    folder: Path,
    output: Path,
    *,
    patterns: list[str] | None = None,
    data: str | None = None,
    num_samples: int | None = None,
    tasks: list[str] | None = None,
    task_data: Path | None = None,
    task_limit: int | None = None,
    needle_lengths: list[int] | None = None,
    needle_count: int = 50,
    seed: int = 0,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluates an exported model under each pattern (default: its own) and writes ``results.json`` and plots into ``output``.

    ``data`` is a folder of `rat-megatron prepare`, ``tasks`` are names for TaskSuite, ``needle_lengths`` are in tokens. All input is
    checked and all questions are made before the first evaluation; the results are written anew after each pattern, so that a run that is
    stopped keeps what it has. Returns the results:

    ``{"model": {...}, "versions": {...}, "settings": {...}, "patterns": {word: {"kv_cache_bytes": {length: bytes}, "loss": {...},
    "tasks": {task: {metric: value}}, "averages": {group: value}, "needles": {length: {kind: {...}}}}}}``

    ``kv_cache_bytes`` is what a real cache holds of one sequence of that length. Raises UserError for whatever is wrong with the input.
    """
    if data is None and not tasks and not needle_lengths:
        raise UserError("nothing to evaluate: give --data, --task or --needle-length.")
    if (output / RESULTS_FILE).exists():
        raise UserError(f"{output / RESULTS_FILE} exists: give another --output, or remove it.")
    loaded = load_model(folder, device=device, dtype=dtype)
    words = list(dict.fromkeys(str(loaded.config.parse_pattern(word)) for word in patterns or [loaded.config.attention_pattern]))
    settings = {"data": data, "num_samples": num_samples, "task_limit": task_limit, "seed": seed, "batch_size": batch_size}
    results: dict[str, Any] = {"model": _describe(loaded), "versions": _versions(), "settings": settings, "patterns": {}}

    validation = ValidationSet(data, loaded, num_samples=num_samples) if data is not None else None
    needles = [NeedleTest(loaded, length, count=needle_count, seed=seed) for length in sorted(set(needle_lengths or []))]
    suite = None
    if tasks:
        from rat_megatron.evaluation.tasks import TaskSuite, averages

        suite = TaskSuite(tasks, loaded, task_data=task_data, batch_size=batch_size)
    lengths = {test.length for test in needles} | ({validation.seq_length} if validation else set())
    lengths |= {loaded.config.max_position_embeddings} if suite else set()

    for word in words:
        loaded.model.set_attention_pattern(word)
        of_pattern = results["patterns"][word] = {"kv_cache_bytes": {str(n): measure_cache(loaded, n) for n in sorted(lengths)}}
        if validation:
            report(f"{word}: validation loss of {validation.num_samples} samples of {validation.seq_length} tokens")
            of_pattern["loss"] = validation_loss(loaded, validation, batch_size=batch_size)
        for test in needles:
            report(f"{word}: needle tests at {test.length} tokens")
            of_pattern.setdefault("needles", {})[str(test.length)] = test.run(loaded, batch_size=batch_size)
        if suite:
            report(f"{word}: {', '.join(suite.names)}")
            of_pattern["tasks"] = suite.run(task_limit)
            of_pattern["averages"] = averages(of_pattern["tasks"])
        write_results(output, results)
    write_plots(output, results)
    return results


@torch.inference_mode()
def measure_cache(loaded: LoadedModel, length: int) -> int:
    """Bytes that the cache of one sequence of ``length`` tokens holds under the model's current attention pattern: of a real one."""
    tokens = torch.randint(loaded.config.vocab_size, (1, length), device=loaded.model.device)
    return getattr(loaded.model(tokens, use_cache=True, logits_to_keep=1), CACHE_NAME).nbytes


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
