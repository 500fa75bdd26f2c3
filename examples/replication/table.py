"""One Markdown table of what `rat-megatron evaluate` found of several models: a row for each pattern and result, a column for each model.

    python examples/replication/table.py RUN

reads RUN/MODEL/scores-*/results.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import typer

from rat_megatron.errors import UserError, exit_2_on_bad_input
from rat_megatron.evaluation.results import RESULTS_FILE


def main(run: Path) -> None:
    """Prints the table of a run. Raises UserError where there is nothing to show."""
    models: dict[str, dict[str, str]] = {}
    for file in sorted(run.glob(f"*/scores-*/{RESULTS_FILE}")):
        of_model = models.setdefault(file.parts[-3], {})
        for pattern, found in json.loads(file.read_text())["patterns"].items():
            of_model |= {f"{pattern}: {name}": value for name, value in cells(found).items()}
    if not models:
        raise UserError(f"{run} has no MODEL/scores-*/{RESULTS_FILE}: evaluate its models first.")
    rows = list(dict.fromkeys(name for of_model in models.values() for name in of_model))
    print(f"| | {' | '.join(models)} |\n|---|{'---:|' * len(models)}")
    for name in rows:
        print(f"| {name} | {' | '.join(of_model.get(name, '') for of_model in models.values())} |")


def cells(found: dict[str, Any]) -> dict[str, str]:
    """The results of one pattern, by name."""
    result: dict[str, str] = {}
    if loss := found.get("loss"):
        result["loss"] = f"{loss['loss']:.4f}"
        if lengths := loss.get("memory_lengths"):
            result["memory, tokens"] = f"{statistics.median(lengths):.2f} ({min(lengths):.2f} to {max(lengths):.2f})"
    for length, kinds in found.get("needles", {}).items():
        for kind, summary in kinds.items():
            result[f"{kind}, {length}"] = f"{summary['score']:.2f}"
    return result


if __name__ == "__main__":
    with exit_2_on_bad_input():
        typer.run(main)
