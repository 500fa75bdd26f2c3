"""`rat-megatron report`: the losses of several runs as a table, a JSON file and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    output: Annotated[Path, typer.Argument(help="Folder for report.json and report.png.")],
    pretrained: Annotated[Path, typer.Option(help="--save folder of the pretraining run.")],
    adapted: Annotated[list[Path] | None, typer.Option(help="--save folder of an adaptation; repeat for each.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="--save folder of the baseline's pretraining run.")] = None,
    baseline_adapted: Annotated[list[Path] | None, typer.Option(help="--save folder of a baseline's adaptation; repeat.")] = None,
) -> None:
    """Compare validation losses per attention pattern, before and after adaptation."""
    from rich.console import Console
    from rich.table import Table

    from rat_megatron.training.monitoring.comparison import write_report

    result = write_report(output, pretrained=pretrained, adapted=adapted or [], baseline=baseline, baseline_adapted=baseline_adapted)
    table = Table(title="Validation loss", title_justify="left")
    for column in ("pattern", "RAT+ pretrained", "RAT+ adapted", "baseline pretrained", "baseline adapted"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for word, losses in result["patterns"].items():
        cells = [part.get(stage) for part in (losses, result["baseline"].get(word, {})) for stage in ("pretrained", "adapted")]
        table.add_row(word, *(f"{cell:.3f}" if cell is not None else "-" for cell in cells))
    Console().print(table)
