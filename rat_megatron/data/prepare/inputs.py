"""Which files `prepare` reads: files and folders of this machine, folders written by Hugging Face `save_to_disk`, data sets on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rat_megatron.errors import UserError, one_line

HUB = "hf://"
FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
KNOWN = f"{', '.join(FORMATS)} (.txt and .jsonl also as {', '.join(COMPRESSIONS)})"
DEFAULT_SPLIT = "train"
SIZE_THREADS = 32  # ask the Hub for the size of files


@dataclass(frozen=True)
class InputFile:
    """`name` does not depend on the machine: relative to the folder that was given, or the address on the Hub."""

    location: str  # a path, or hf://datasets/NAME@COMMIT/...
    name: str
    format: str  # a value of FORMATS
    compression: str | None  # a value of COMPRESSIONS
    size: int
    version: Any  # changes when the content may have changed

    @property
    def is_remote(self) -> bool:
        return self.location.startswith(HUB)


def list_files(inputs: Iterable[str | Path], excluded: Path, subset: str | None = None, split: str | None = None) -> list[InputFile]:
    """The files of all inputs in a fixed order; nothing under `excluded`. Raises UserError for an input that is none.

    An input is a file; a folder, searched for files of a known kind; or hf://NAME[@REVISION], a data set on the Hugging Face Hub. `subset`
    chooses among the subsets of Hub data sets; `split` (default: train) there and in folders of several splits by `save_to_disk`."""
    files: list[InputFile] = []
    used = {"subset": False, "split": False}  # an option that says nothing about the inputs is a mistake
    for given in map(str, inputs):
        if given.startswith(HUB):
            files += _hub_files(given, subset, split or DEFAULT_SPLIT)
            used = {"subset": True, "split": True}
            continue
        if "://" in given:
            raise UserError(f"input {given} cannot be read from there: copy it to this machine, or name a data set of the Hub, {HUB}NAME.")
        path = Path(given)
        if (path / "dataset_dict.json").is_file():
            path, used["split"] = _split_folder(path, split or DEFAULT_SPLIT), True
        if path.is_file():
            if _kind(path.name) is None:
                raise UserError(f"input {path} is of no known kind: give {KNOWN} files, folders of them or {HUB}NAME.")
            files.append(_local_file(path, path.name))
        elif path.is_dir():
            files += _folder_files(path, excluded)
        else:
            raise UserError(f"input {path} does not exist.")
    for option, value in (("subset", subset), ("split", split)):
        if value is not None and not used[option]:
            raise UserError(f"--{option} {value} chooses nothing: no input is a data set of the Hub ({HUB}NAME){_OR_DICT[option]}.")
    seen: set[str] = set()
    for file in files:
        if file.location in seen:
            raise UserError(f"input {file.location} is given twice.")
        seen.add(file.location)
    return files


_OR_DICT = {"subset": "", "split": " or a folder of several splits"}


def _kind(name: str) -> tuple[str, str | None] | None:
    """Format and compression, by the end of the name. Compressed `.json` is JSON lines, as in C4; plain `.json` is mostly metadata."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    stem = name.removesuffix(compression)
    if compression and stem.endswith(".json"):
        stem += "l"
    format = next((format for ending, format in FORMATS.items() if stem.endswith(ending)), None)
    if format is None or (compression and format in ("parquet", "arrow")):
        return None
    return format, COMPRESSIONS.get(compression)


def _local_file(path: Path, name: str) -> InputFile:
    stat, path = path.stat(), path.resolve()
    return InputFile(str(path), name, *_kind(name), stat.st_size, stat.st_mtime_ns)


def _folder_files(folder: Path, excluded: Path) -> list[InputFile]:
    excluded = excluded.resolve()
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and excluded not in path.resolve().parents]
    saved: dict[Path, set[str] | None] = {}
    files = []
    for path in found:
        if path.parent not in saved:
            saved[path.parent] = _saved_names(path.parent)
        listed = saved[path.parent]
        if _kind(path.name) and (listed is None or path.name in listed):
            files.append(_local_file(path, path.relative_to(folder).as_posix()))
    if not files:
        raise UserError(f"input folder {folder} holds no {KNOWN} file.")
    return files


def _saved_names(folder: Path) -> set[str] | None:
    """The files of a data set written by `save_to_disk`, which may have the caches of later `map` calls beside them; None elsewhere."""
    try:
        return {file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _split_folder(folder: Path, split: str) -> Path:
    splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
    if split not in splits:
        raise UserError(f"input {folder} has no split {split!r}, only {', '.join(splits)}: choose one with --split.")
    return folder / split


def _hub_files(address: str, subset: str | None, split: str) -> list[InputFile]:
    """The files that `datasets` reads for this subset and split, at the commit that is current now. Nothing of them is read yet."""
    import fsspec
    from datasets import load_dataset_builder

    name, _, revision = address.removeprefix(HUB).partition("@")
    try:
        data_files = load_dataset_builder(name, subset, revision=revision or None).config.data_files or {}
    except Exception as error:  # the Hub, the network and the data set's own description each have their kind
        raise UserError(f"input {address} cannot be found: {one_line(error)}.") from error
    found = {str(name): [str(location) for location in files] for name, files in data_files.items()}
    if split not in found:
        raise UserError(f"input {address} has no split {split!r}, only {', '.join(found)}: choose one with --split.")
    locations = found[split]
    unknown = next((location for location in locations if _kind(location) is None), None)
    if unknown:
        remedy = f"try its Parquet copy, {HUB}{name}@refs/convert/parquet"
        raise UserError(f"input {address} has files of no known kind, such as {unknown.rpartition('/')[2]}: {remedy}.")
    if not all(location.startswith(HUB) for location in locations):  # a folder of this machine
        return [_local_file(Path(location), location) for location in locations]
    files = fsspec.filesystem("hf")
    with ThreadPoolExecutor(SIZE_THREADS) as threads:
        sizes = threads.map(lambda location: files.info(location)["size"], locations)
        try:
            return [InputFile(location, location, *_kind(location), size, None) for location, size in zip(locations, sizes, strict=True)]
        except OSError as error:
            raise UserError(f"input {address} cannot be read: {one_line(error)}.") from error
