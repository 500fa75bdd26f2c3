"""The inputs of `prepare`: how files are cut into units of work, and the documents in a unit. Which files there are: `inputs.py`."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import lzma
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from rat_megatron.data.prepare.inputs import InputFile
from rat_megatron.data.prepare.settings import MESSAGES
from rat_megatron.errors import UserError, one_line
from rat_megatron.files import DISK_FULL

UNIT_BYTES = 32 << 20  # of text, about; fixed, so that units do not depend on the number of workers
PLANNING_THREADS = 32  # wait for the footers of Parquet files on the Hub
READ_AHEAD_BYTES = 8 << 20  # asked for at once from the Hub
HUB_ATTEMPTS = 6  # to read something from the Hub; waits 1, 2, 4, 8 and 16 seconds between them


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: whole text files, the lines that begin in a byte range, row groups (Parquet) or rows (Arrow)."""

    files: tuple[InputFile, ...]
    begin: int  # byte, row group or row; the end is exclusive
    end: int
    size: int  # bytes, for the progress bar
    key: str  # changes whenever what the unit reads may have changed

    @property
    def is_remote(self) -> bool:
        return self.files[0].is_remote


def plan_units(files: list[InputFile], columns: dict[str, str]) -> list[Unit]:
    """Cuts the files, in order, into units of about UNIT_BYTES. `columns` are those to be read, by their flags.

    Raises UserError for a Parquet or Arrow file without them, and for plain text where more than the text is asked for."""
    *_, flag = columns
    if flag != "--text-column" and (plain := next((file for file in files if file.format == "text"), None)):
        raise UserError(f"input {plain.location} is plain text and has no {flag}: give JSONL, Parquet or Arrow.")
    units: list[Unit] = []
    texts: list[InputFile] = []  # small text files share a unit
    texts_size = 0
    with ThreadPoolExecutor(PLANNING_THREADS) as threads:
        tables = (file if file.format in ("parquet", "arrow") else None for file in files)
        planned = [threads.submit(retrying, file, _plan_table, file, columns) if file else None for file in tables]
        for file, table in zip(files, planned, strict=True):
            if file.format == "text":
                texts.append(file)
                texts_size += file.size
            if texts and (file.format != "text" or texts_size >= UNIT_BYTES):
                units.append(_unit(texts, 0, len(texts), texts_size))
                texts, texts_size = [], 0
            if table is not None:
                units += table.result()
            elif file.format == "jsonl":  # a compressed file is read as a whole
                edges = [0, file.size] if file.compression else [*range(0, file.size, UNIT_BYTES), file.size]
                units += [_unit([file], begin, end, end - begin) for begin, end in pairwise(edges)]
    if texts:
        units.append(_unit(texts, 0, len(texts), texts_size))
    return units


def retrying[T](file: InputFile, function: Callable[..., T], *arguments: Any) -> T:
    """The result of function(*arguments), which reads `file`; from the Hub it is tried several times. Raises UserError when all fail."""
    if not file.is_remote:
        return function(*arguments)
    failed, wait = retry_if_exception_type(OSError), wait_exponential_jitter(jitter=0.5)
    try:
        return Retrying(retry=failed, stop=stop_after_attempt(HUB_ATTEMPTS), wait=wait, reraise=True)(function, *arguments)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"{file.location} cannot be read, start the same command again to go on: {one_line(error)}.") from error


def _unit(files: list[InputFile], begin: int, end: int, size: int) -> Unit:
    facts = [(file.location, file.size, file.version) for file in files]
    key = hashlib.sha256(repr((files[0].format, facts, begin, end)).encode()).hexdigest()[:24]
    return Unit(tuple(files), begin, end, size, key)


def _plan_table(file: InputFile, columns: dict[str, str]) -> list[Unit]:
    if file.format == "arrow":
        with _readable(file):
            table = _arrow_table(file)
        _check_columns(file, table.schema, columns)
        rows = max(1, UNIT_BYTES * table.num_rows // file.size)
        edges = [*range(0, table.num_rows, rows), table.num_rows]
        return [_unit([file], begin, end, (end - begin) * file.size // table.num_rows) for begin, end in pairwise(edges)]
    with _readable(file), pyarrow.parquet.ParquetFile(_source(file)) as table:
        metadata, schema = table.metadata, table.schema_arrow
    _check_columns(file, schema, columns)
    units, begin, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            units.append(_unit([file], begin, group + 1, size))
            begin, size = group + 1, 0
    return units


def _check_columns(file: InputFile, schema: pyarrow.Schema, columns: dict[str, str]) -> None:
    for flag, column in columns.items():
        if column not in schema.names:
            raise UserError(f"{file.location} has no column {column!r}, only {', '.join(schema.names)}: choose one with {flag}.")
        found, types = schema.field(column).type, pyarrow.types
        wanted, fits = "text", types.is_string(found) or types.is_large_string(found)
        if flag == MESSAGES:
            wanted = "conversations"
            fits = (types.is_list(found) or types.is_large_list(found)) and types.is_struct(found.value_type)
        if not fits:
            raise UserError(f"column {column!r} of {file.location} holds {found}, not {wanted}: choose another with {flag}.")


# ---- reading -------------------------------------------------------------------------------------------------------------------------


def read_documents(unit: Unit, columns: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """The documents of a unit in order, the text of each of `columns`, all valid Unicode; those without a text are left out.

    A conversation comes as JSON.

    Raises UserError for what cannot be read."""
    read = {"text": _read_text, "parquet": _read_parquet, "arrow": _read_arrow, "jsonl": _read_jsonl}[unit.files[0].format]
    for texts in read(unit, columns):
        if all(texts):
            yield tuple(_valid(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)) for text in texts)


def _valid(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates


@contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Turns what goes wrong inside into one sentence that names the file. What goes wrong on the way from the Hub is left to be retried."""
    try:
        yield
    except (pyarrow.ArrowInvalid, lzma.LZMAError, EOFError, OSError) as error:
        if file.is_remote and not isinstance(error, pyarrow.ArrowInvalid):
            raise
        kind = {"parquet": "Parquet", "arrow": "Arrow"}.get(file.format)
        what = f"is not a readable {kind} file" if kind and isinstance(error, pyarrow.ArrowInvalid) else "cannot be read"
        raise UserError(f"{file.location} {what}: {one_line(error)}.") from error


def _open(file: InputFile) -> BinaryIO:
    """The file's bytes, decompressed."""
    if file.compression in ("gzip", "zstd"):
        return io.BufferedReader(pyarrow.CompressedInputStream(_source(file), file.compression))
    if file.compression:
        decompress: Any = {"xz": lzma.open, "bz2": bz2.open}[file.compression]
        return decompress(_source(file))
    return io.BufferedReader(_source(file), 1 << 20) if file.is_remote else open(file.location, "rb")


def _source(file: InputFile) -> Any:
    """What pyarrow and the decompressors open: the path, or an open file of the Hub."""
    if not file.is_remote:
        return file.location
    import fsspec

    return fsspec.filesystem("hf").open(file.location, "rb", block_size=READ_AHEAD_BYTES)


def _arrow_table(file: InputFile) -> pyarrow.Table:
    """Mapped into memory, not read. `datasets` writes the stream format; the other one begins with its name."""
    source = pyarrow.memory_map(file.location)
    reader = pyarrow.ipc.open_file if source.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
    source.seek(0)
    return reader(source).read_all()


def _read_text(unit: Unit, _: dict[str, str]) -> Iterator[tuple[str]]:
    for file in unit.files:
        with _readable(file), _open(file) as opened:
            content = opened.read()
        try:
            yield (content.decode("utf-8"),)
        except UnicodeDecodeError as error:
            raise UserError(f"{file.location} is not UTF-8 text (byte {error.start}): convert it first.") from error


def _read_parquet(unit: Unit, columns: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    file, groups = unit.files[0], range(unit.begin, unit.end)
    with _readable(file), pyarrow.parquet.ParquetFile(_source(file), pre_buffer=file.is_remote) as table:
        for batch in table.iter_batches(batch_size=256, row_groups=list(groups), columns=list(columns.values())):
            yield from _rows(batch, columns)


def _read_arrow(unit: Unit, columns: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    with _readable(unit.files[0]):
        table = _arrow_table(unit.files[0])
        for begin in range(unit.begin, unit.end, 256):
            yield from _rows(table.slice(begin, min(256, unit.end - begin)), columns)


def _rows(table: pyarrow.Table | pyarrow.RecordBatch, columns: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(table.column(column).to_pylist() for column in columns.values()), strict=True)


def _read_jsonl(unit: Unit, columns: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """Of a plain file, the lines that begin in [begin, end); of a compressed one, all lines."""
    plain = unit.files[0].compression is None
    with _readable(unit.files[0]), _open(unit.files[0]) as opened:
        position = 0
        if unit.begin:
            opened.seek(unit.begin - 1)  # one back: a line that begins exactly at `begin` is ours
            position = unit.begin - 1 + len(opened.readline())
        while (position < unit.end or not plain) and (line := opened.readline()):
            if line.strip():
                yield _texts_of_line(line, unit.files[0], position, columns)
            position += len(line)


def _texts_of_line(line: bytes, file: InputFile, position: int, columns: dict[str, str]) -> tuple[Any, ...]:
    try:
        document = json.loads(line)
    except ValueError as error:  # also what is not UTF-8
        raise UserError(f"{_place(file, position)} is not JSON ({error}): correct or remove it.") from error
    for flag, column in columns.items():
        if not isinstance(document, dict) or column not in document:
            raise UserError(f"{_place(file, position)} has no field {column!r}: name the one with the text with {flag}.")
        text = document[column]
        if flag == MESSAGES and text is not None:
            if not isinstance(text, list) or not all(isinstance(message, dict) and "role" in message for message in text):
                raise UserError(f"field {column!r} in {_place(file, position)} is no list of messages, each with a role and its content.")
        elif text is not None and not isinstance(text, str):
            raise UserError(f"field {column!r} in {_place(file, position)} holds {type(text).__name__}, not text.")
    return tuple(document[column] for column in columns.values())


def _place(file: InputFile, position: int) -> str:
    """The line that begins at `position` in words; counted only when there is something to complain about."""
    lines = 1
    with _open(file) as opened:
        while position and (block := opened.read(min(position, 1 << 20))):
            lines, position = lines + block.count(b"\n"), position - len(block)
    return f"line {lines} of {file.location}"
