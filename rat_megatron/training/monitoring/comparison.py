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
    "iterations": n}``; of runs with several validation sets ``"validation_sets": {name: {"patterns": {...}, "baseline": {...}}}`` in the
    place of the first two, and a ``report-NAME.png`` each. A model adapted to a pattern counts under that pattern. Raises UserError when a
    run has no report, or was not evaluated on what the first one was.
    """
    if baseline_adapted and not baseline:
        raise UserError("--baseline-adapted needs --baseline: give the --save folder of the baseline's pretraining run too")
    first, *others = [_read(run) for run in (pretrained, *(adapted or []))]
    base = _read(baseline) if baseline else None
    base_others = [_read(run) for run in baseline_adapted or []]
    tables = {
        name: {"patterns": _table(first, others, name), "baseline": _table(base, base_others, name) if base else {}}
        for name in first["validation_sets"]
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        _plot(table, output / (f"report-{name}.png" if name else "report.png"))
        _print(table, name)
    speed = {"tokens_per_second": first["tokens_per_second"], "iterations": first["iteration"]}
    comparison = (tables[""] if "" in tables else {"validation_sets": tables}) | speed
    write_json(output / "report.json", comparison)
    return comparison


def _print(comparison: dict[str, Any], name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Validation loss on {name}" if name else "Validation loss", title_justify="left")
    for column in ("pattern", "RAT+ pretrained", "RAT+ adapted", "baseline pretrained", "baseline adapted"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for word, losses in comparison["patterns"].items():
        parts = (losses, comparison["baseline"].get(word, {}))
        table.add_row(word, *(_cell(part, stage) for part in parts for stage in ("pretrained", "adapted")))
    Console().print(table)


def _cell(losses: dict[str, float | None], stage: str) -> str:
    if stage not in losses:
        return "-"
    return "not finite" if losses[stage] is None else f"{losses[stage]:.3f}"


def _read(run: Path) -> dict[str, Any]:
    """A run's report, with the losses by pattern of its validation sets; a single set has no name."""
    from rat_megatron.ratplus.pattern import AttentionPattern  # here because torch takes seconds, and --help should not

    path = run / "report.json"
    try:
        report = json.loads(path.read_text())
        sets = report["validation_sets"] if "validation_sets" in report else {"": report["patterns"]}
        report["pattern"] = str(AttentionPattern.parse(report["pattern"]))  # older runs kept words as they were typed
        report["validation_sets"] = {
            name: {str(AttentionPattern.parse(word)): loss for word, loss in losses.items()} for name, losses in sets.items()
        }
        return report
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the --save folder of a run that was evaluated (--eval-iters above 0)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): evaluate the run again") from error


def _table(pretrained: dict[str, Any], adapted: list[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """The losses on one validation set by pattern."""
    table = {word: {"pretrained": loss} for word, loss in _losses_on(name, pretrained).items()}
    for run in adapted:
        word, losses = run["pattern"], _losses_on(name, run)
        if word not in losses:
            raise UserError(f"the run adapted to {word} was not evaluated under it: evaluate it with --rat-eval-patterns {word}")
        table.setdefault(word, {})["adapted"] = losses[word]
    return table


def _losses_on(name: str, run: dict[str, Any]) -> dict[str, float]:
    if name not in run["validation_sets"]:
        what = f"on {name}" if name else "on a single validation set"
        raise UserError(f"a run of pattern {run['pattern']} was not evaluated {what}, as the pretrained one was: evaluate both alike")
    return run["validation_sets"][name]


def _plot(comparison: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    words = list(comparison["patterns"])
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.4 * len(words), 4))
    for name, table, color in (("RAT+", comparison["patterns"], "tab:blue"), ("baseline", comparison["baseline"], "tab:orange")):
        for stage, line, marker in (("pretrained", ":", "o"), ("adapted", "-", "s")):
            points = [(index, table[word][stage]) for index, word in enumerate(words) if table.get(word, {}).get(stage) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), line, marker=marker, color=color, label=f"{name}, {stage}")
    axes.set_xticks(range(len(words)), words)
    axes.set_xlabel("attention pattern")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
