"""Packages of Debian, PyPI and npm: downloaded by the registries' own clients as these are set up, and read without being installed."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rat_megatron.errors import one_line
from rat_megatron.files import atomic_folder

SUFFIXES = (".deb", ".whl", ".tgz", ".tar.gz", ".zip")
COMMANDS = {
    "debian": ["apt-get", "--quiet", "download"],
    "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"],
    "npm": ["npm", "pack", "--silent"],
}
PATIENCE = 1800  # seconds for a download


class PackageMissing(Exception):
    """A package cannot be had, or cannot be read. One sentence."""


def fetch(registry: str, package: str, folder: Path) -> Path:
    """The file of a package in ``folder``, downloaded if the folder is not there yet. Raises PackageMissing."""
    if not folder.exists():
        command = [*COMMANDS[registry], package]
        if shutil.which(command[0]) is None:
            raise PackageMissing(f"{command[0]}, which fetches the {registry} package {package}, is not installed")
        try:
            with atomic_folder(folder) as unfinished:
                done = subprocess.run(command, cwd=unfinished, capture_output=True, text=True, timeout=PATIENCE)
                if done.returncode:
                    raise PackageMissing(f"the {registry} package {package} cannot be had: {_last_error(done.stderr or done.stdout)}")
        except subprocess.TimeoutExpired as error:
            raise PackageMissing(f"the {registry} package {package} did not come within {PATIENCE} seconds") from error
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    if not files:
        raise PackageMissing(f"{folder} has no package in it: remove the folder, so that {package} is fetched again")
    return files[0]


def _last_error(output: str) -> str:
    """The last line that calls itself an error, or the last one, without addresses."""
    lines = [line for line in output.splitlines() if line.strip()] or ["its client says nothing"]
    errors = [line for line in lines if re.match(r"(E:|ERROR:|npm (ERR!|error) \w)", line)]
    return re.sub(r"\w+://\S+", "the registry", one_line(ValueError((errors or lines)[-1])))


def version_of(package: Path) -> str:
    """NAME_VERSION_ARCHITECTURE.deb, NAME-VERSION-TAGS.whl, NAME-VERSION.tgz"""
    name = urllib.parse.unquote(package.name)
    if name.endswith(".deb"):
        return name.split("_")[1]
    if name.endswith(".whl"):
        return name.split("-")[1]
    found = re.search(r"-(\d[^-]*(?:-[a-z]+\.?\d+)?)\.(?:tgz|tar\.gz|zip)$", name)
    return found[1] if found else "unknown"


def members(package: Path, wanted: re.Pattern[str]) -> Iterator[tuple[re.Match[str], str, bytes]]:
    """(match, path, content) of the files whose path from its beginning is ``wanted``, in the package's order; .gz and .dz come unpacked.

    Raises PackageMissing where the package is damaged.
    """
    try:
        for path, content in _files(package, wanted):
            match = wanted.match(path)
            if match:
                yield match, path, gzip.decompress(content) if path.endswith((".gz", ".dz")) else content
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise PackageMissing(f"{package} cannot be read: remove its folder, so that it is fetched again ({one_line(error)})") from error


def _files(package: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if package.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                if wanted.match(name):
                    yield name, archive.read(name)
    elif package.name.endswith(".deb"):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacked:
            with tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
                yield from _tar_files(archive, wanted)
            assert unpacked.stdout is not None
            unpacked.stdout.read()  # the padding behind the last file
        if unpacked.returncode:
            raise OSError("dpkg-deb finds it damaged")
    else:
        with tarfile.open(package, mode="r|gz") as archive:
            yield from _tar_files(archive, wanted)


def _tar_files(archive: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for entry in archive:
        name = entry.name.removeprefix("./")
        content = archive.extractfile(entry) if entry.isreg() and wanted.match(name) else None
        if content is not None:
            yield name, content.read()
