"""Files from a store into the node's cache, through MosaicML Streaming's downloaders: every wait has an end, failed attempts are repeated
with growing pauses, and a file gets its name only once its size and hash are right."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from rat_megatron.data.format import SHARD_HASH
from rat_megatron.errors import UserError, one_line
from rat_megatron.files import DISK_FULL

if TYPE_CHECKING:
    from streaming.base.format import FileInfo
    from streaming.base.storage.download import CloudDownloader

ATTEMPT_SECONDS = 120.0  # for one file
PATIENCE_SECONDS = 300.0  # of failures, after which the last attempt begins: in all less than the 10 minutes that other ranks wait
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; doubled in between
DAMAGED_COPIES = 3  # of one file, after which the one in the store is taken to be damaged
UNFINISHED = ".part"

log = logging.getLogger(__name__)
_FINAL = {"401", "403", "404", "NoSuchKey", "NoSuchBucket", "AccessDenied"}  # waiting does not help


class Downloader:
    """Fetches the files of one store, over connections that end with this object, and that no fork takes over from its parent."""

    def __init__(self) -> None:
        self._connected: tuple[int, CloudDownloader] | None = None  # the process, and Streaming's downloader there

    def download(self, url: str, path: Path, expected: FileInfo | None = None) -> None:
        """Fetches `url` to `path`, which appears whole, with the size and hash that are expected, or not at all.

        Repeats what fails, and says so. Raises UserError when the file is not there or not what is expected, when the store does not
        recover in time, and when the disk is full."""
        started, damaged = time.monotonic(), 0

        def attempt() -> None:
            nonlocal damaged
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
            try:
                self._fetch(url, part)
                if expected and (problem := damage(part, expected)):
                    damaged += 1
                    raise _DamagedCopy(problem)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

        def warn(failed: RetryCallState) -> None:
            error = failed.outcome and failed.outcome.exception()
            problem, pause = error and one_line(error), failed.upcoming_sleep
            log.warning("%s: attempt %d failed (%s), the next in %.1f s", url, failed.attempt_number, problem, pause)

        path.parent.mkdir(parents=True, exist_ok=True)
        attempts = Retrying(
            retry=retry_if_exception(lambda error: damaged < DAMAGED_COPIES and not _is_final(error)),
            stop=stop_after_delay(PATIENCE_SECONDS),
            wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
            sleep=lambda seconds: time.sleep(seconds * random.uniform(0.5, 1.5)),  # not all ranks at once
            before_sleep=warn,
            reraise=True,
        )
        try:
            attempts(attempt)
        except Exception as error:  # each storage service raises its own
            if _disk_is_full(error):
                raise UserError(
                    f"no space is left in the cache folder {path.parent} for {url}: free some, or give a lower --rat-data-cache-limit, "
                    "or --data-cache-path on another disk"
                ) from error
            if damaged == DAMAGED_COPIES:
                raise UserError(f"{url} {error}, also when downloaded again: copy or prepare the data anew") from error
            tried = f"attempt {attempts.statistics['attempt_number']}: {one_line(error)}"
            raise UserError(f"{url} cannot be downloaded ({tried}): check that it is there, the address and the credentials") from error
        if (number := attempts.statistics["attempt_number"]) > 1:
            log.warning("%s: downloaded at attempt %d, after %.1f s", url, number, time.monotonic() - started)

    def _fetch(self, url: str, path: Path) -> None:
        """One attempt, in a thread that is left behind if it does not end: not every downloader of Streaming heeds its timeout."""
        outcome: Future[None] = Future()

        def run() -> None:
            try:
                self._connect(url).download(url, str(path), ATTEMPT_SECONDS)
                outcome.set_result(None)
            except Exception as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            outcome.result(ATTEMPT_SECONDS)
        except Exception:
            self._connected = None  # the next attempt begins with a new connection
            if not outcome.done():
                raise TimeoutError(f"not complete within {ATTEMPT_SECONDS:.0f} s") from None
            raise

    def _connect(self, url: str) -> CloudDownloader:
        from streaming.base.storage.download import CloudDownloader

        connected = self._connected  # another thread may drop it
        if connected is None or connected[0] != os.getpid():
            self._connected = connected = os.getpid(), CloudDownloader.get(url)
        return connected[1]


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


class _DamagedCopy(Exception):
    """What was downloaded is not what index.json says."""


def _is_final(error: BaseException) -> bool:
    """Whether waiting does not help: no such file, no permission, no such kind of address, a full disk, or the program is to end."""
    response: Any = getattr(error, "response", None)
    codes = [getattr(error, "code", None), getattr(error, "status_code", None), getattr(response, "status_code", None)]
    if isinstance(response, dict):
        codes.append(response.get("Error", {}).get("Code"))
    answered = isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError) or _FINAL & set(map(str, codes))
    return bool(answered or type(error).__name__ == "NoCredentialsError" or _disk_is_full(error) or not isinstance(error, Exception))


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
