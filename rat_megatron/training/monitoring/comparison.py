"""Puts the report.json of several runs side by side: loss of each pattern before and after adaptation, with the baseline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rat_megatron.errors import UserError


def write_report(
    output: Path, *, pretrained: Path, adapted: list[Path], baseline: Path | None = None, baseline_adapted: list[Path] | None = None
) -> dict[str, Any]:
    """Writes ``report.json`` and ``report.png`` into ``output`` from the checkpoint folders of finished runs; returns the report.

    ``{"patterns": {word: {"pretrained": loss, "adapted": loss}}, "baseline": {word: {...}}, "tokens_per_second": n}``. A model adapted
    to a pattern counts under that pattern. Raises UserError when a run has no report.
    """
    first = _read(pretrained)
    report = {
        "patterns": _table(first, [_read(run) for run in adapted]),
        "baseline": _table(_read(baseline), [_read(run) for run in baseline_adapted or []]) if baseline else {},
        "tokens_per_second": first["tokens_per_second"],
        "iterations": first["iteration"],
    }
    output.mkdir(parents=True, exist_ok=True)
    _plot(report, output / "report.png")
    temporary = output / "report.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, output / "report.json")
    return report


def _read(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the --save folder of a run that was evaluated (--eval-iters above 0)") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): evaluate the run again") from error


def _table(pretrained: dict[str, Any], adapted: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    table = {word: {"pretrained": loss} for word, loss in pretrained["patterns"].items()}
    for run in adapted:
        table.setdefault(run["pattern"], {})["adapted"] = run["patterns"][run["pattern"]]
    return table


def _plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    words = list(report["patterns"])
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.4 * len(words), 4))
    for name, table, color in (("RAT+", report["patterns"], "tab:blue"), ("baseline", report["baseline"], "tab:orange")):
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
