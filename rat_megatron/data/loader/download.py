"""Files from a store into the node's cache, through MosaicML Streaming's downloaders: every wait has an end, failed attempts are repeated
with growing pauses, and a file gets its name only once its size and hash are right."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import xxhash
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_delay,
    wait_exponential,
)

from rat_megatron.data.format import SHARD_HASH
from rat_megatron.errors import UserError, one_line

if TYPE_CHECKING:
    from streaming.base.format import FileInfo

ATTEMPT_SECONDS = 120.0  # for one file
PATIENCE_SECONDS = 300.0  # of failures, after which the last attempt begins: in all less than the 10 minutes that other ranks wait
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; doubled in between
DAMAGED_COPIES = 3  # of one file, after which the one in the store is taken to be damaged
UNFINISHED = ".part"

log = logging.getLogger(__name__)
_FINAL = {"401", "403", "404", "NoSuchKey", "NoSuchBucket", "AccessDenied"}  # waiting does not help


class Connections:
    """Streaming's downloaders, with their connections, one for each host; a fork gets its own."""

    def __init__(self):
        self._downloaders: dict[tuple[int, str, str], Any] = {}

    def to(self, url: str) -> Any:
        from streaming.base.storage.download import CloudDownloader

        parts = urlparse(url)
        key = (os.getpid(), parts.scheme, parts.netloc)
        if key not in self._downloaders:
            self._downloaders[key] = CloudDownloader.get(url)
        return self._downloaders[key]

    def forget(self) -> None:
        """After a failure, whose connection may be at fault."""
        self._downloaders.clear()


def download(url: str, path: Path, expected: FileInfo | None = None, connections: Connections | None = None) -> None:
    """Fetches `url` to `path`, which appears whole, with the size and hash that are expected, or not at all.

    Repeats what fails, and says so. Raises UserError when the file is not there or not what is expected, when the store does not
    recover in time, and when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connections = connections or Connections()
    damaged = 0

    def once() -> None:
        nonlocal damaged
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
        try:
            _fetch(url, part, connections)
            problem = expected and damage(part, expected)
            if not problem:
                os.replace(part, path)
                return
        except Exception as error:  # each storage service raises its own
            if _disk_is_full(error):
                raise UserError(
                    f"no space is left in the cache folder {path.parent} for {url}: free some, or give a lower --rat-data-cache-limit, "
                    "or --data-cache-path on another disk"
                ) from error
            raise (_Final if _is_final(error) else _Failed)(one_line(error)) from error
        finally:
            part.unlink(missing_ok=True)
        damaged += 1
        if damaged == DAMAGED_COPIES:
            raise UserError(f"{url} {problem}, also when downloaded again: copy or prepare the data anew")
        raise _Failed(problem)

    def say(state: RetryCallState) -> None:
        log.warning(
            "%s: attempt %d failed (%s), the next in %.1f s", url, state.attempt_number, state.outcome.exception(), state.upcoming_sleep
        )

    attempts = Retrying(
        retry=retry_if_exception_type(_Failed) & retry_if_not_exception_type(_Final),
        stop=stop_after_delay(PATIENCE_SECONDS),
        wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
        sleep=lambda seconds: time.sleep(seconds * random.uniform(0.5, 1.5)),  # not all ranks at once
        before_sleep=say,
        reraise=True,
    )
    try:
        attempts(once)
    except _Failed as error:
        number = attempts.statistics["attempt_number"]
        raise UserError(
            f"{url} cannot be downloaded (attempt {number}: {error}): check that it is there, the address and the credentials"
        ) from error
    if (number := attempts.statistics["attempt_number"]) > 1:
        log.warning("%s: downloaded at attempt %d, after %.1f s", url, number, attempts.statistics["delay_since_first_attempt"])


class _Failed(Exception):
    """An attempt that may go better another time."""


class _Final(_Failed):
    """One that will not."""


def damage(path: Path, expected: FileInfo) -> str | None:
    """What is wrong with a file, to be put after its name; None if its size and hash are those expected. Raises OSError."""
    if (size := path.stat().st_size) != expected.bytes:
        return f"has {size} bytes instead of {expected.bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, xxhash.xxh64).hexdigest()  # type: ignore[arg-type]
    return None if found == expected.hashes[SHARD_HASH] else f"is damaged ({SHARD_HASH} {found} instead of {expected.hashes[SHARD_HASH]})"


def remove_unfinished(folder: Path) -> None:
    """Removes what killed runs began to download into a folder."""
    for path in folder.glob(f"*{UNFINISHED}*"):  # some downloaders write to a name of their own beside the one they are given
        path.unlink(missing_ok=True)


def _fetch(url: str, path: Path, connections: Connections) -> None:
    """One attempt, in a thread that is left behind if it does not end: not every downloader of Streaming heeds its timeout."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            connections.to(url).download(url, str(path), ATTEMPT_SECONDS)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ATTEMPT_SECONDS)
    if not outcome or outcome[0] is not None:
        connections.forget()
    if not outcome:
        raise TimeoutError(f"not complete within {ATTEMPT_SECONDS:.0f} s")
    if outcome[0] is not None:
        raise outcome[0]


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
