"""What an evaluation found, as results.json, as a table, and as plots against the size of the KV cache."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rat_megatron.errors import UserError
from rat_megatron.files import atomic_file, write_json

RESULTS_FILE = "results.json"


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Writes ``results.json``, whole or not at all. Raises UserError where ``output`` cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RESULTS_FILE, results)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error


def result_table(results: dict[str, Any]) -> Any:
    """A Rich table: a row for each result, a column for each pattern."""
    from rich.table import Table

    patterns = results["patterns"]
    table = Table(title=f"{results['model']['folder']}", title_justify="left")
    table.add_column("")
    for word in patterns:
        table.add_column(word, justify="right")
    rows: dict[str, dict[str, str]] = {}
    for word, of_pattern in patterns.items():
        for length, size in of_pattern["kv_cache_bytes"].items():
            rows.setdefault(f"KV cache of {length} tokens, KiB", {})[word] = f"{size / 1024:,.1f}"
        for name, value, stderr, _ in _values(of_pattern):
            digits = 4 if name == "validation loss" else 3
            rows.setdefault(name, {})[word] = f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")
        if lengths := of_pattern.get("loss", {}).get("memory_lengths"):
            rows.setdefault("memory length, tokens, median of layers", {})[word] = f"{statistics.median(lengths):,.1f}"
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(word, "-") for word in patterns))
    return table


def write_plots(output: Path, results: dict[str, Any]) -> None:
    """Writes ``loss.png``, ``needles.png`` and ``tasks.png``, those that there are results for: each against the KV cache in bytes."""
    model = results["model"]
    by_plot: dict[str, dict[str, list[tuple[float, float, float, str]]]] = {"loss": {}, "needles": {}, "tasks": {}}
    for word, of_pattern in results["patterns"].items():
        for name, value, stderr, length in _values(of_pattern):
            plot = "loss" if name == "validation loss" else ("needles" if name.startswith("needles ") else "tasks")
            size = of_pattern["kv_cache_bytes"][str(length or model["max_position_embeddings"])]
            by_plot[plot].setdefault(name, []).append((size / 2**20, value, stderr or 0.0, word))
    labels = {"loss": "validation loss", "needles": "share of needles found", "tasks": "score"}
    for plot, lines in by_plot.items():
        if lines:
            _plot(lines, labels[plot], output / f"{plot}.png")


def _values(of_pattern: dict[str, Any]) -> Iterator[tuple[str, float, float | None, int | None]]:
    """Name, value, standard error and length in tokens (None: the model's positions) of every result that a table shows."""
    if loss := of_pattern.get("loss"):
        yield "validation loss", loss["loss"], loss.get("stderr"), loss["seq_length"]
    if "tasks" in of_pattern:
        from rat_megatron.evaluation.tasks import headline

        for task, metrics in of_pattern["tasks"].items():
            if metric := headline(task, metrics):
                yield f"{task} ({metric})", metrics[metric], metrics.get(f"{metric}_stderr"), None
        for group, value in of_pattern["averages"].items():
            yield f"{group}, average", value, None, None
    for length, kinds in of_pattern.get("needles", {}).items():
        for kind, summary in kinds.items():
            yield f"needles {kind}, {length} tokens", summary["score"], summary.get("stderr"), int(length)


def _plot(lines: dict[str, list[tuple[float, float, float, str]]], label: str, path: Path) -> None:
    """One line for each name: points (MiB, value, standard error, pattern)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in lines.items():
        sizes, values, errors, _ = zip(*sorted(points), strict=True)
        axes.errorbar(sizes, values, yerr=errors, marker="o", capsize=2, label=name)
    words = {size: word for points in lines.values() for size, _, _, word in points}
    for size, word in words.items():
        axes.annotate(word, (size, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", rotation=90, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("KV cache of one sequence, MiB")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)
