"""Where `prepare` puts finished data: a local folder, sftp://, or a store that MosaicML Streaming writes to (s3://, gs://, ...).

Nothing that lies there is overwritten, one run at a time writes there, and rat_meta.json comes last."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import paramiko
from filelock import FileLock, Timeout
from fsspec.implementations.sftp import SFTPFileSystem
from tenacity import Retrying, stop_after_attempt, wait_exponential_jitter

from rat_megatron.data.format import INDEX_FILE, META_FILE, hash_of
from rat_megatron.errors import UserError, one_line
from rat_megatron.files import write_json

UNFINISHED = ".unfinished"
SETTINGS_FILE = "settings.json"  # of unfinished work
ATTEMPTS = 5  # to upload a file; waits 1, 2, 4 and 8 seconds between them
DOWNLOAD_TIMEOUT = 60.0  # seconds
GO_ON = "start the same command again to go on"


class Destination:
    """`address` is a folder or a URL; `work` the local folder of unfinished work, which holds files under the names they will have."""

    def __init__(self, address: str, work: Path, is_store: bool) -> None:
        self.address, self.work, self.is_store = address, work, is_store
        self._connected: tuple[int, Callable[[str], None]] | None = None  # the process, since connections do not survive a fork

    @property
    def shown(self) -> str:
        """The address without a password."""
        return _shown(self.address)

    # ---- what lies there already -------------------------------------------------------------------------------------------------

    def finished(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """rat_meta.json of the data set with these facts, None when it is still to be made.

        Raises UserError when something else is there."""
        meta = self.read_json(META_FILE)
        if meta is not None:
            self._compare(meta, facts, "already holds a data set made")
            shutil.rmtree(self.work, ignore_errors=True)  # killed between its last two steps
            return meta
        output = Path(self.address)
        if (self.work / SETTINGS_FILE).is_file():
            foreign = False
        elif self.is_store:
            foreign = self.read_json(f"train/{INDEX_FILE}") is not None
        else:
            foreign = output.is_dir() and not self.work.is_dir() and any(output.iterdir())
        if foreign:
            raise UserError(f"--output {self.shown} is not empty and was not written by this command: give another folder.")
        return None

    @contextmanager
    def exclusive(self, settings: dict[str, Any]) -> Iterator[None]:
        """Holds the folder of unfinished work: one run at a time, all with the same settings."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / "lock", timeout=10)  # the workers of a killed run hold it until they notice
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another run is writing to --output {self.shown}: wait for it, or give another folder.") from None
        try:
            stored = self.work / SETTINGS_FILE
            if any(self.work.glob("*.train")):  # before the first unit is done, nothing is lost by other settings
                self._compare(json.loads(stored.read_text()), settings, "holds an unfinished run")
            for path in self.work.glob("*.tmp"):  # of a killed run
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(stored, settings)
            yield
        finally:
            lock.release()

    def _compare(self, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
        there = {"deduplicate": False, "answer_column": None, "special_tokens": "split", **there}  # older data sets do not say so
        for name, value in wanted.items():
            if there.get(name) != value:
                change = "other input files" if name == "inputs_hash" else f"{name} {there.get(name)}, not {value}"
                raise UserError(f"--output {self.shown} {what} with {change}: give another folder, or delete this one.")

    # ---- writing and reading back ------------------------------------------------------------------------------------------------

    def upload(self, name: str) -> None:
        """Moves WORK/`name` to the store, when there is one. Raises UserError when it stays unreachable."""
        if not self.is_store:
            return
        wait = wait_exponential_jitter(jitter=0.5)
        attempts = Retrying(stop=stop_after_attempt(ATTEMPTS), wait=wait, before_sleep=lambda _: self.close(), reraise=True)
        try:
            attempts(lambda: self._connect()(name))
        except Exception as error:
            raise UserError(f"{self.shown}/{name} cannot be uploaded, {GO_ON}: {one_line(error)}.") from error
        (self.work / name).unlink(missing_ok=True)  # some uploaders leave it

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a file of the finished data, or None when it is not there. Raises UserError when that cannot be told."""
        if not self.is_store:
            path = Path(self.address) / name
            return json.loads(path.read_text()) if path.is_file() else None
        from streaming.base.storage.download import CloudDownloader

        try:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / "read.json"
                CloudDownloader.direct_download(f"{self.address.removeprefix('file://')}/{name}", str(local), DOWNLOAD_TIMEOUT)
                return json.loads(local.read_text())
        except Exception as error:
            if _is_missing(error):
                return None
            raise UserError(f"{self.shown}/{name} cannot be read, check the address and the credentials: {one_line(error)}.") from error

    def publish(self, names: list[str], meta: dict[str, Any]) -> None:
        """Moves the finished folders `names` to their place, writes rat_meta.json last and removes the work folder."""
        if self.is_store:
            write_json(self.work / META_FILE, meta)
            self.upload(META_FILE)
        else:
            output = Path(self.address)
            for name in names:
                shutil.rmtree(output / name, ignore_errors=True)  # ours: a run killed inside this loop left it
                if (self.work / name).is_dir():
                    os.rename(self.work / name, output / name)
            for path in output.glob(f"{META_FILE}.*.tmp"):  # of a run killed just before its end
                path.unlink()
            write_json(output / META_FILE, meta)
        shutil.rmtree(self.work)

    def check(self) -> None:
        """Raises UserError for a store that cannot be reached, so that a wrong address ends before the work begins."""
        try:
            if self.is_store:
                self._connect()
        except Exception as error:  # each store has its own; without a client library it is ImportError
            raise UserError(f"--output {self.shown} cannot be used, check the address and the credentials: {one_line(error)}.") from error

    def close(self) -> None:
        """Drops the connection; another is made when it is needed."""
        self._connected = None

    def _connect(self) -> Callable[[str], None]:
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = os.getpid(), _open_uploader(self.address, self.work)
        return self._connected[1]


def open_destination(output: str | Path, work_dir: Path | None) -> Destination:
    """Raises UserError for a store that cannot be used.

    A local folder keeps unfinished work inside itself, unless `work_dir` names another place; then it is written to like a store."""
    address = str(output).rstrip("/")
    if "://" not in address:
        if Path(address).is_file():
            raise UserError(f"--output {address} is a file: give a folder.")
        if work_dir is None:
            return Destination(address, Path(address) / UNFINISHED, is_store=False)
        address = f"file://{Path(address).absolute()}"
    if work_dir is None:
        raise UserError(f"--output {_shown(address)} is a URL: name a local folder for unfinished work with --work-dir.")
    destination = Destination(address, Path(work_dir) / f"prepare-{hash_of(address)}", is_store=True)
    destination.check()
    return destination


def _shown(address: str) -> str:
    return re.sub(r"(://[^/@]*):[^/@]*@", r"\1:***@", address)


def _is_missing(error: Exception) -> bool:
    """The stores' ways of saying that there is no such file."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(response, "status_code", None)
    codes = {str(code), *(str(getattr(error, name, None)) for name in ("code", "status", "status_code"))}
    return isinstance(error, FileNotFoundError) or bool(codes & {"404", "NoSuchKey"})


# ---- uploaders -------------------------------------------------------------------------------------------------------------------------


def _open_uploader(address: str, work: Path) -> Callable[[str], None]:
    """What copies WORK/NAME to the store in one attempt. fsspec serves folders and SFTP; all others need no package beside Streaming's."""
    scheme = urllib.parse.urlsplit(address).scheme
    if scheme in ("file", "sftp"):
        files = fsspec.filesystem("file") if scheme == "file" else _Sftp(**_Sftp._get_kwargs_from_urls(address))
        folder = address.removeprefix("file://") if scheme == "file" else _Sftp._strip_protocol(address)

        def upload(name: str) -> None:
            target = f"{folder}/{name}"
            files.makedirs(os.path.dirname(target), exist_ok=True)
            files.put_file(str(work / name), f"{target}.tmp")
            files.mv(f"{target}.tmp", target)  # so it appears whole

        return upload
    from streaming.base.storage.upload import CloudUploader

    with tempfile.TemporaryDirectory() as empty:  # it refuses a folder with files in it
        uploader = CloudUploader.get((empty, address), retry=1)
    uploader.local = str(work)
    return uploader.upload_file


class _Sftp(SFTPFileSystem):
    """fsspec's would trust any host: this one knows hosts and keys as Streaming's downloader does, by the same environment variables."""

    cachable = False
    put_file = SFTPFileSystem.put

    def _connect(self) -> None:
        self.client = paramiko.SSHClient()
        self.client.load_system_host_keys(os.environ.get("COMPOSER_SFTP_KNOWN_HOSTS_FILE"))
        self.client.connect(self.host, key_filename=os.environ.get("COMPOSER_SFTP_KEY_FILE"), **self.ssh_kwargs)
        self.ftp = self.client.open_sftp()
