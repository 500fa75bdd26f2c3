"""Files and folders that appear whole under their name, or not at all, whatever ends the program meanwhile."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rat_megatron.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file open for writing beside ``path``, whose place it takes, flushed to the disk, when the block ends without an error."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """NaN and infinity, which JSON has no words for, are written as null: they are found where much has gone well before."""
    with atomic_file(path) as file:
        file.write(json.dumps(_with_null(value), indent=2, allow_nan=False) + "\n")


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(output: Path) -> None:
    """Raises UserError unless the folder does not exist or is empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: give another, or remove it")


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
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
