"""How every conversion writes: beside the output and under its name only when all is done, so that a failure leaves nothing behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rat_megatron.errors import UserError


def check_output(output: Path) -> None:
    """Raises UserError unless the folder does not exist or is empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: give another, or remove it")


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder to write into; it becomes ``output`` at the end, and vanishes with whatever is in it when an error ends the block."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            folder = Path(temporary) / "output"
            folder.mkdir()
            yield folder
            if output.exists():
                output.rmdir()
            folder.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
