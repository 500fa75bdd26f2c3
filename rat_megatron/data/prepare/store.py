"""Where `prepare` puts finished data: a local folder, or a store that MosaicML Streaming writes to (s3://, gs://, ...), or sftp://."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_exponential

from rat_megatron.data.format import META_FILE, hash_of
from rat_megatron.errors import UserError, one_line
from rat_megatron.files import write_json

UNFINISHED = ".unfinished"
ATTEMPTS = 5  # to upload a file; waits 1, 2, 4 and 8 seconds between them
DOWNLOAD_TIMEOUT = 60.0  # seconds
GO_ON = "start the same command again to go on"


@dataclass(frozen=True)
class Destination:
    """`address` is a folder or a URL; `work` the local folder of unfinished work, which holds files under the names they will have."""

    address: str
    work: Path
    is_store: bool
    _uploaders: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)  # one a process: connections do not survive a fork

    @property
    def shown(self) -> str:
        """The address without a password."""
        return _shown(self.address)

    def upload(self, name: str) -> None:
        """Moves WORK/`name` to the store, when there is one. Raises UserError when it stays unreachable."""
        if not self.is_store:
            return
        uploader = self.open()
        local = Path(uploader.local)
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.work / name, local / name)
        try:
            if "://" not in uploader.remote:  # a folder: Streaming does not make those inside it
                (Path(uploader.remote) / name).parent.mkdir(parents=True, exist_ok=True)
            uploader.upload_file(name)
        except Exception as error:
            raise UserError(f"{self.shown}/{name} cannot be uploaded, {GO_ON}: {one_line(error)}") from error
        (local / name).unlink(missing_ok=True)  # some uploaders leave it

    def open(self) -> Any:
        """This process's connection: its `upload_file(NAME)` copies `local`/NAME to the store, with retries. Raises UserError."""
        process = os.getpid()
        if process not in self._uploaders:
            self._uploaders[process] = _open_uploader(self.address, self.work / f"upload.{process}.tmp")
        return self._uploaders[process]

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a file of the finished data, or None when it is not there. Raises UserError when that cannot be told."""
        if not self.is_store:
            path = Path(self.address) / name
            return json.loads(path.read_text()) if path.is_file() else None
        from streaming.base.storage.download import CloudDownloader

        local = self.work / f"download.{os.getpid()}.tmp"
        local.unlink(missing_ok=True)
        try:
            CloudDownloader.direct_download(f"{self.address.removeprefix('file://')}/{name}", str(local), DOWNLOAD_TIMEOUT)
            return json.loads(local.read_text())
        except Exception as error:
            if _is_missing(error):
                return None
            raise UserError(f"{self.shown}/{name} cannot be read, check the address and the credentials: {one_line(error)}") from error
        finally:
            local.unlink(missing_ok=True)

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
            write_json(output / META_FILE, meta)
        shutil.rmtree(self.work)


def open_destination(output: str | Path, work_dir: Path | None) -> Destination:
    """A store is tried here, so that a wrong address ends before the work begins. Raises UserError.

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
    destination.open()
    return destination


def _open_uploader(address: str, staging: Path) -> Any:
    url = address.removeprefix("file://")
    try:
        if urllib.parse.urlsplit(url).scheme == "sftp":
            return _SftpUploader(staging, url)
        from streaming.base.storage.upload import CloudUploader

        shutil.rmtree(staging, ignore_errors=True)
        return CloudUploader.get((str(staging), url), retry=ATTEMPTS)
    except Exception as error:  # each store has its own; without a client library it is ImportError
        raise UserError(f"--output {_shown(address)} cannot be used, check the address and the credentials: {one_line(error)}") from error


def _shown(address: str) -> str:
    return re.sub(r"(://[^/@]*):[^/@]*@", r"\1:***@", address)


def _is_missing(error: Exception) -> bool:
    """The stores' ways of saying that there is no such file."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(response, "status_code", None)
    codes = {str(code), *(str(getattr(error, name, None)) for name in ("code", "status", "status_code"))}
    return isinstance(error, FileNotFoundError) or bool(codes & {"404", "NoSuchKey"})


class _SftpUploader:
    """Streaming reads from sftp:// but does not write there: the same client and the same environment variables as its downloader.

    fsspec's client for SFTP would accept any host key."""

    def __init__(self, local: Path, remote: str) -> None:
        self.local, self.remote = str(local), remote
        self._connect()

    def _connect(self) -> None:
        from streaming.base.storage.download import SFTPDownloader

        downloader = SFTPDownloader()
        downloader._validate_remote_path(self.remote)
        downloader._create_ssh_client(urllib.parse.urlsplit(self.remote))
        self._sftp = downloader._ssh_client.open_sftp()

    def upload_file(self, name: str) -> None:
        """Appears whole under its name."""
        target = f"{urllib.parse.urlsplit(self.remote).path}/{name}"

        def put() -> None:
            if self._sftp is None:
                self._connect()
            self._make_folders(os.path.dirname(target))
            self._sftp.put(os.path.join(self.local, name), f"{target}.tmp")
            self._sftp.posix_rename(f"{target}.tmp", target)

        def disconnect(_: RetryCallState) -> None:
            self._sftp = None

        Retrying(stop=stop_after_attempt(ATTEMPTS), wait=wait_exponential(1), after=disconnect, reraise=True)(put)

    def _make_folders(self, folder: str) -> None:
        try:
            self._sftp.stat(folder)
        except FileNotFoundError:
            self._make_folders(os.path.dirname(folder))
            self._sftp.mkdir(folder)
