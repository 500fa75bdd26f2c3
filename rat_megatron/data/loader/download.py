"""Files from a store into the node's cache, through MosaicML Streaming's downloaders: every wait has an end, failed attempts are repeated
with growing pauses, and a file gets its name only once its size and hash are right."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import xxhash

from rat_megatron.data.format import SHARD_HASH
from rat_megatron.errors import UserError

if TYPE_CHECKING:
    from streaming.base.format import FileInfo

ATTEMPT_SECONDS = 120.0  # for one file
PATIENCE_SECONDS = 300.0  # of failures, after which the last attempt begins: in all less than the 10 minutes that other ranks wait
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; doubled in between
DAMAGED_COPIES = 3  # of one file, after which the one in the store is taken to be damaged
UNFINISHED = ".part"

log = logging.getLogger(__name__)
_numbers = itertools.count()
_downloaders: dict[tuple[int, str, str], Any] = {}
_FINAL = {"401", "403", "404", "NoSuchKey", "NoSuchBucket", "AccessDenied"}  # waiting does not help


def download(url: str, path: Path, expected: FileInfo | None = None) -> None:
    """Fetches `url` to `path`, which appears whole, with the size and hash that are expected, or not at all.

    Repeats what fails, and says so. Raises UserError when the file is not there or not what is expected, when the store does not
    recover in time, and when the disk is full."""
    started, pause, damaged = time.monotonic(), FIRST_PAUSE, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(1):
        part = path.with_name(f"{path.name}.{os.getpid()}.{next(_numbers)}{UNFINISHED}")
        try:
            _fetch(url, part)
            problem = expected and damage(part, expected)
            if not problem:
                os.replace(part, path)
                break
            damaged += 1
            final = damaged == DAMAGED_COPIES
        except Exception as error:  # each storage service raises its own
            if _disk_is_full(error):
                raise UserError(
                    f"no space is left in the cache folder {path.parent} for {url}: free some, or give a lower --rat-data-cache-limit, "
                    "or --data-cache-path on another disk"
                ) from error
            problem, final = _first_line(error), _is_final(error)
        finally:
            part.unlink(missing_ok=True)
        if final or time.monotonic() - started > PATIENCE_SECONDS:
            raise UserError(
                f"{url} {problem}, also when downloaded again: copy or prepare the data anew"
                if damaged == DAMAGED_COPIES
                else f"{url} cannot be downloaded (attempt {attempt}: {problem}): check that it is there, the address and the credentials"
            )
        log.warning("%s: attempt %d failed (%s), the next in %.1f s", url, attempt, problem, pause)
        time.sleep(pause * random.uniform(0.5, 1.5))  # not all ranks at once
        pause = min(2 * pause, LONGEST_PAUSE)
    if attempt > 1:
        log.warning("%s: downloaded at attempt %d, after %.1f s", url, attempt, time.monotonic() - started)


def damage(path: Path, expected: FileInfo) -> str | None:
    """What is wrong with a file, to be put after its name; None if its size and hash are those expected. Raises OSError."""
    if (size := path.stat().st_size) != expected.bytes:
        return f"has {size} bytes instead of {expected.bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, xxhash.xxh64).hexdigest()
    return None if found == expected.hashes[SHARD_HASH] else f"is damaged ({SHARD_HASH} {found} instead of {expected.hashes[SHARD_HASH]})"


def remove_unfinished(folder: Path) -> None:
    """Removes what killed runs began to download into a folder."""
    for path in folder.glob(f"*{UNFINISHED}*"):  # some downloaders write to a name of their own beside the one they are given
        path.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> None:
    """One attempt, in a thread that is left behind if it does not end: not every downloader of Streaming heeds its timeout."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            _downloader(url).download(url, str(path), ATTEMPT_SECONDS)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ATTEMPT_SECONDS)
    if not outcome or outcome[0] is not None:
        _downloaders.clear()  # with their connections
    if not outcome:
        raise TimeoutError(f"not complete within {ATTEMPT_SECONDS:.0f} s")
    if outcome[0] is not None:
        raise outcome[0]


def _downloader(url: str) -> Any:
    """Streaming's downloader for an address, with the connections of this process to its host."""
    from streaming.base.storage.download import CloudDownloader

    parts = urlparse(url)
    key = (os.getpid(), parts.scheme, parts.netloc)  # a fork must not use the connections of its parent
    if key not in _downloaders:
        _downloaders[key] = CloudDownloader.get(url)
    return _downloaders[key]


def _is_final(error: Exception) -> bool:
    """Whether the store has answered, and will answer the same again: no such file, no permission, no such kind of address."""
    response: Any = getattr(error, "response", None)
    codes = [getattr(error, "code", None), getattr(error, "status_code", None), getattr(response, "status_code", None)]
    if isinstance(response, dict):
        codes.append(response.get("Error", {}).get("Code"))
    without_answer = (FileNotFoundError, PermissionError, ImportError, ValueError)
    return isinstance(error, without_answer) or type(error).__name__ == "NoCredentialsError" or bool(_FINAL & set(map(str, codes)))


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
