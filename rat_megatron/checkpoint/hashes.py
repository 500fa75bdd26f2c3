"""Hashes of a checkpoint's files, in ``hashes.json`` beside them: a file that is damaged or cut short is found before it is used.

In a run every rank hashes the files that it wrote, and later checks a share of them; a single process takes all. A process uses threads,
as reading and xxh64 both let the others run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash

from rat_megatron.checkpoint import ADAPTED_NAME, TRACKER_NAME
from rat_megatron.errors import UserError, one_line
from rat_megatron.files import write_json

HASHES_NAME = "hashes.json"
_OWN_NAME = re.compile(rf"hashes(_\d+)?\.json|{ADAPTED_NAME}")  # what is written, or goes on being written, afterwards
_ALGORITHM = "xxh64"


def write_hashes(folder: Path) -> None:
    """Hashes the files of an iteration's folder, once all are there; every rank calls this, and in a run it ends together for all."""
    start, (rank, ranks) = time.perf_counter(), _place()
    in_background = _of_rank(folder, rank)
    known = json.loads(in_background.read_text()) if in_background.is_file() else {}
    mine = [path for path in folder.iterdir() if path.is_file() and not _OWN_NAME.fullmatch(path.name) and _writer(path) % ranks == rank]
    found = _gather(known | _facts_of([path for path in mine if path.name not in known]))
    in_background.unlink(missing_ok=True)
    if rank == 0:
        files = dict(sorted((name, facts) for share in found for name, facts in share.items()))
        write_json(folder / HASHES_NAME, {"algorithm": _ALGORITHM, "files": files})
        unfinished(folder).unlink(missing_ok=True)
        _say(folder, "hashed", files, start)
    _gather(None)  # nobody goes on to move the tracker before the file is there


def hash_own_files(folder: Path, rank: int) -> None:
    """In the process that wrote the files of ``rank`` in the background: write_hashes() then finds their hashes."""
    with suppress(OSError):  # a full disk, which the writer has noted: training ends when it hears of it
        write_json(_of_rank(folder, rank), _facts_of([path for path in folder.glob("*.distcp") if _writer(path) == rank]))


def check_hashes(folder: Path) -> None:
    """Raises UserError, on every rank, for the first file that is not as it was written; an older folder is said to be unchecked."""
    begin_check(folder)()


def begin_check(folder: Path) -> Callable[[], None]:
    """check_hashes() beside what else goes on: a thread hashes this rank's share, and the function returned here waits and raises."""
    start, (rank, ranks) = time.perf_counter(), _place()
    files = _read(folder)
    if files is None:
        if rank == 0:
            print(f"rat-megatron: {folder} was written without hashes: its files are not checked", flush=True)
        return lambda: None
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    thread = ThreadPoolExecutor(1)
    share = thread.submit(_faults, folder, files, by_size[rank::ranks])
    thread.shutdown(wait=False)

    def finish() -> None:
        faults = [fault for found in _gather(share.result()) for fault in found]
        if faults:
            raise _gather(damaged(folder, faults[0]) if rank == 0 else None)[0]
        if rank == 0:
            _say(folder, "checked", files, start)

    return finish


def check_quickly(folder: Path) -> None:
    """The same before the ranks know each other, without reading much: every file's size, and the bytes of those without tensors."""
    files = _read(folder) or {}
    if fault := next((fault for name in files if (fault := _size_fault(folder / name, files[name]))), None):
        raise damaged(folder, fault, by_size=True)
    if faults := _faults(folder, files, [name for name in files if not name.endswith(".distcp")]):
        raise damaged(folder, faults[0], by_size=True)


def damaged(folder: Path, fault: str, by_size: bool = False) -> UserError:
    """What is wrong with a file of an iteration's folder, and from which other iteration to go on: the newest that is whole."""
    checkpoint = folder.parent
    if (whole := newest_whole(checkpoint, folder, by_size)) is None:
        return UserError(f"{fault}: no other iteration in {checkpoint} is known to be whole")
    return UserError(
        f"{fault}: the newest whole iteration in {checkpoint} is {whole.name}, to resume from it write "
        f"{int(whole.name.removeprefix('iter_'))} into {checkpoint / TRACKER_NAME}"
    )


def newest_whole(checkpoint: Path, but: Path, by_size: bool = False) -> Path | None:
    """The newest iteration, ``but`` one, whose files are as its hashes say, or of the size they say; older folders cannot tell."""
    for folder in reversed(iterations(checkpoint)):
        try:
            files = _read(folder) if folder.resolve() != but.resolve() else None
        except UserError:
            continue
        if files and not (any(_size_fault(folder / name, files[name]) for name in files) if by_size else _faults(folder, files, files)):
            return folder
    return None


def has_hashes(folder: Path) -> bool:
    return (folder / HASHES_NAME).is_file()


def iterations(checkpoint: Path) -> list[Path]:
    """The folders ``iter_*`` that were written to their end, oldest first."""
    return sorted(
        path
        for path in checkpoint.glob("iter_*")
        if re.fullmatch(r"iter_\d+", path.name) and (path / "metadata.json").is_file() and not unfinished(path).exists()
    )


def unfinished(folder: Path) -> Path:
    """The file beside an iteration's folder that is there while it is being written."""
    return folder.with_name(f".{folder.name}.unfinished")


def _place() -> tuple[int, int]:
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _in_a_run() else (0, 1)


def _in_a_run() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [value] * _place()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _of_rank(folder: Path, rank: int) -> Path:
    """Hashes of the files that a rank has written in the background."""
    return folder / f"hashes_{rank}.json"


def _writer(path: Path) -> int:
    """The rank that wrote ``__RANK_NUMBER.distcp``; the first, of anything else."""
    match = re.search(r"__(\d+)_\d+\.distcp$", path.name)
    return int(match[1]) if match else 0


def _read(folder: Path) -> dict[str, dict[str, Any]] | None:
    path = folder / HASHES_NAME
    try:
        content = json.loads(path.read_text())
        if content["algorithm"] != _ALGORITHM:
            raise UserError(f"{path} holds hashes of the kind {content['algorithm']}: this version knows {_ALGORITHM}")
        return {name: {"bytes": int(facts["bytes"]), "hash": str(facts["hash"])} for name, facts in content["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read, it is damaged ({one_line(error)}): remove it to go on without a check") from error


def _faults(folder: Path, files: dict[str, dict[str, Any]], names: Iterable[str]) -> list[str]:
    def fault(name: str) -> str | None:
        path = folder / name
        if wrong := _size_fault(path, files[name]):
            return wrong
        try:
            return None if _facts(path)["hash"] == files[name]["hash"] else f"{path} is damaged, its bytes are not those that were written"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"

    return [found for found in _in_threads(fault, list(names)) if found]


def _size_fault(path: Path, facts: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path} cannot be read ({error.strerror or error})"
    return None if size == facts["bytes"] else f"{path} is damaged, it has {size} bytes instead of {facts['bytes']}"


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "hash": hashlib.file_digest(file, xxhash.xxh64).hexdigest()}  # type: ignore[arg-type]


def _facts_of(files: list[Path]) -> dict[str, dict[str, Any]]:
    return dict(zip((path.name for path in files), _in_threads(_facts, files), strict=True))


def _in_threads(function: Any, items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, items))


def _say(folder: Path, done: str, files: dict[str, dict[str, Any]], start: float) -> None:
    if not _in_a_run():
        return
    seconds, gigabytes = time.perf_counter() - start, sum(facts["bytes"] for facts in files.values()) / 1e9
    print(f"rat-megatron: {done} {len(files)} files of {folder.name}, {gigabytes:.3g} GB in {seconds:.3g} s", flush=True)
