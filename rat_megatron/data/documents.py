"""The inputs of `prepare`: which files there are, how they are cut into units of work, and the documents in a unit."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rat_megatron.errors import UserError

UNIT_BYTES = 32 << 20  # of text, about; fixed, so that units do not depend on the number of workers
KINDS = {".txt": "text", ".jsonl": "jsonl", ".jsonl.gz": "gzip", ".jsonl.zst": "zstd", ".parquet": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """`name` is relative to the folder that was given, so that it does not depend on the machine."""

    path: Path
    name: str
    kind: str  # a value of KINDS


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: whole text files, the lines that begin in a byte range, or a range of row groups."""

    kind: str
    paths: tuple[Path, ...]
    begin: int  # byte or row group; the end is exclusive
    end: int
    size: int  # bytes, for the progress bar
    key: str  # changes whenever what the unit reads may have changed


def list_files(inputs: Iterable[str | Path], excluded: Path) -> list[InputFile]:
    """The files named, and those of a known kind inside the folders named, in a fixed order; nothing under `excluded`."""
    files = []
    for given in map(Path, inputs):
        if given.is_file():
            if _kind(given) is None:
                raise UserError(f"input {given} is of no known kind: give {', '.join(KINDS)} files or folders of them.")
            files.append(InputFile(given, given.name, _kind(given)))
        elif given.is_dir():
            found = sorted(path for path in given.rglob("*") if path.is_file() and excluded.resolve() not in path.resolve().parents)
            known = [InputFile(path, path.relative_to(given).as_posix(), kind) for path in found if (kind := _kind(path))]
            if not known:
                raise UserError(f"input folder {given} holds no {', '.join(KINDS)} file.")
            files += known
        else:
            raise UserError(f"input {given} does not exist.")
    seen: set[Path] = set()
    for file in files:
        if file.path.resolve() in seen:
            raise UserError(f"input {file.path} is given twice.")
        seen.add(file.path.resolve())
    return files


def _kind(path: Path) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if path.name.lower().endswith(suffix)), None)


def plan_units(files: list[InputFile], text_column: str) -> list[Unit]:
    """Cuts the files, in order, into units of about UNIT_BYTES. Raises UserError for a Parquet file without the text column."""
    units: list[Unit] = []
    texts: list[Path] = []  # small text files share a unit
    texts_size = 0
    for file in files:
        size = file.path.stat().st_size
        if file.kind == "text":
            texts, texts_size = [*texts, file.path], texts_size + size
        if texts and (file.kind != "text" or texts_size >= UNIT_BYTES):
            units.append(_unit("text", texts, 0, len(texts), texts_size))
            texts, texts_size = [], 0
        if file.kind == "jsonl":
            edges = [*range(0, size, UNIT_BYTES), size]
            units += [_unit("jsonl", [file.path], begin, end, end - begin) for begin, end in pairwise(edges)]
        elif file.kind == "parquet":
            units += _parquet_units(file.path, text_column)
        elif file.kind != "text":
            units.append(_unit(file.kind, [file.path], 0, size, size))  # compressed: read as a whole
    if texts:
        units.append(_unit("text", texts, 0, len(texts), texts_size))
    return units


def _unit(kind: str, paths: list[Path], begin: int, end: int, size: int) -> Unit:
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr((kind, facts, begin, end)).encode()).hexdigest()[:24]
    return Unit(kind, tuple(paths), begin, end, size, key)


def _parquet_units(path: Path, text_column: str) -> list[Unit]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    if text_column not in schema.names:
        raise UserError(f"{path} has no column {text_column!r}, only {', '.join(schema.names)}: choose one with --text-column.")
    column_type = schema.field(text_column).type
    if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
        raise UserError(f"column {text_column!r} of {path} holds {column_type}, not text: choose another with --text-column.")
    units, begin, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            units.append(_unit("parquet", [path], begin, group + 1, size))
            begin, size = group + 1, 0
    return units


def read_documents(unit: Unit, text_column: str) -> Iterator[str]:
    """The documents of a unit in order, each valid Unicode; empty ones are left out. Raises UserError for what cannot be read."""
    read = {"text": _read_text, "parquet": _read_parquet}.get(unit.kind, _read_jsonl)
    try:
        for text in read(unit, text_column):
            if text:
                yield text if text.isascii() else text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates
    except (OSError, pyarrow.ArrowInvalid) as error:
        names = ", ".join(map(str, unit.paths))
        raise UserError(f"{names} cannot be read: {str(error).splitlines()[0]}") from error


def _read_text(unit: Unit, _: str) -> Iterator[str]:
    for path in unit.paths:
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first.") from error


def _read_parquet(unit: Unit, text_column: str) -> Iterator[str | None]:
    with pyarrow.parquet.ParquetFile(unit.paths[0]) as file:
        for batch in file.iter_batches(batch_size=256, row_groups=list(range(unit.begin, unit.end)), columns=[text_column]):
            yield from batch.column(0).to_pylist()


def _read_jsonl(unit: Unit, text_column: str) -> Iterator[str | None]:
    """Of a plain file, the lines that begin in [begin, end); of a compressed one, all lines."""
    plain = unit.kind == "jsonl"
    with _open_lines(unit) as file:
        position = 0
        if unit.begin:
            file.seek(unit.begin - 1)  # one back: a line that begins exactly at `begin` is ours
            position = unit.begin - 1 + len(file.readline())
        while (position < unit.end or not plain) and (line := file.readline()):
            if line.strip():
                yield _text_of_line(line, unit, position, text_column)
            position += len(line)


def _open_lines(unit: Unit) -> io.BufferedReader:
    path = unit.paths[0]
    return open(path, "rb") if unit.kind == "jsonl" else io.BufferedReader(pyarrow.CompressedInputStream(str(path), unit.kind))


def _text_of_line(line: bytes, unit: Unit, position: int, text_column: str) -> str | None:
    try:
        document = json.loads(line)
    except ValueError as error:  # also what is not UTF-8
        raise UserError(f"{_place(unit, position)} is not JSON ({error}): correct or remove it.") from error
    if not isinstance(document, dict) or text_column not in document:
        raise UserError(f"{_place(unit, position)} has no field {text_column!r}: name the one with the text with --text-column.")
    text = document[text_column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"field {text_column!r} in {_place(unit, position)} holds {type(text).__name__}, not text.")
    return text


def _place(unit: Unit, position: int) -> str:
    """The line that begins at `position` in words; counted only when there is something to complain about."""
    lines = 1
    with _open_lines(unit) as file:
        while position and (block := file.read(min(position, 1 << 20))):
            lines, position = lines + block.count(b"\n"), position - len(block)
    return f"line {lines} of {unit.paths[0]}"
