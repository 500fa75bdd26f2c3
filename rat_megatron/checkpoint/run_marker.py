"""The file ``finished`` beside the checkpoints of a run that came to its end: it tells Slurm's script not to start the run again."""

from __future__ import annotations

import os
from pathlib import Path

FINISHED_NAME = "finished"


def clear_finished(save: str | None) -> None:
    """At the start of a run: it may have been given more iterations since."""
    if save and os.environ.get("RANK", "0") == "0":
        (Path(save) / FINISHED_NAME).unlink(missing_ok=True)


def mark_finished(save: str | None) -> None:
    """At the end of a run that did all its iterations, after its last checkpoint."""
    if save and os.environ.get("RANK", "0") == "0":
        Path(save).mkdir(parents=True, exist_ok=True)
        (Path(save) / FINISHED_NAME).touch()
