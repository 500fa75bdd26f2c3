"""`rat-megatron report`: the report.json of several runs side by side, loss of each pattern before and after adaptation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rat_megatron.errors import UserError, one_line
from rat_megatron.files import write_json


def compare_runs(
    output: Annotated[Path, typer.Argument(help="Folder for report.json and report.png.")],
    pretrained: Annotated[Path, typer.Option(help="--save folder of the pretraining run.")],
    adapted: Annotated[list[Path] | None, typer.Option(help="--save folder of an adaptation; repeat for each.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="--save folder of the baseline's pretraining run.")] = None,
    baseline_adapted: Annotated[list[Path] | None, typer.Option(help="--save folder of a baseline's adaptation; repeat.")] = None,
) -> dict[str, Any]:
    """Compare validation losses per attention pattern, before and after adaptation.\f

    ``report.json``: ``{"patterns": {word: {"pretrained": loss, "adapted": loss}}, "baseline": {word: {...}}, "tokens_per_second": n,
    "iterations": n}``. A model adapted to a pattern counts under that pattern. Raises UserError when a run has no report.
    """
    first = _read(pretrained)
    comparison = {
        "patterns": _table(first, [_read(run) for run in adapted or []]),
        "baseline": _table(_read(baseline), [_read(run) for run in baseline_adapted or []]) if baseline else {},
        "tokens_per_second": first["tokens_per_second"],
        "iterations": first["iteration"],
    }
    output.mkdir(parents=True, exist_ok=True)
    _plot(comparison, output / "report.png")
    write_json(output / "report.json", comparison)
    _print(comparison)
    return comparison


def _print(comparison: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Validation loss", title_justify="left")
    for column in ("pattern", "RAT+ pretrained", "RAT+ adapted", "baseline pretrained", "baseline adapted"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for word, losses in comparison["patterns"].items():
        cells = [part.get(stage) for part in (losses, comparison["baseline"].get(word, {})) for stage in ("pretrained", "adapted")]
        table.add_row(word, *(f"{cell:.3f}" if cell is not None else "-" for cell in cells))
    Console().print(table)


def _read(run: Path) -> dict[str, Any]:
    from rat_megatron.ratplus.pattern import AttentionPattern  # here because torch takes seconds, and --help should not

    path = run / "report.json"
    try:
        report = json.loads(path.read_text())
        report["pattern"] = str(AttentionPattern.parse(report["pattern"]))  # older runs kept words as they were typed
        report["patterns"] = {str(AttentionPattern.parse(word)): loss for word, loss in report["patterns"].items()}
        return report
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the --save folder of a run that was evaluated (--eval-iters above 0)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): evaluate the run again") from error


def _table(pretrained: dict[str, Any], adapted: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    table = {word: {"pretrained": loss} for word, loss in pretrained["patterns"].items()}
    for run in adapted:
        word = run["pattern"]
        if word not in run["patterns"]:
            raise UserError(f"the run adapted to {word} was not evaluated under it: evaluate it with --rat-eval-patterns {word}")
        table.setdefault(word, {})["adapted"] = run["patterns"][word]
    return table


def _plot(comparison: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    words = list(comparison["patterns"])
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.4 * len(words), 4))
    for name, table, color in (("RAT+", comparison["patterns"], "tab:blue"), ("baseline", comparison["baseline"], "tab:orange")):
        for stage, line, marker in (("pretrained", ":", "o"), ("adapted", "-", "s")):
            points = [(index, table[word][stage]) for index, word in enumerate(words) if stage in table.get(word, {})]
            if points:
                axes.plot(*zip(*points, strict=True), line, marker=marker, color=color, label=f"{name}, {stage}")
    axes.set_xticks(range(len(words)), words)
    axes.set_xlabel("attention pattern")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
