"""A transformers encoder and its tokenizer from a folder, checked before transformers sees it.

transformers repairs in silence what is missing: a folder without tokenizer files gives a tokenizer of five
words, and weights that are not in the file are drawn at random. Both are errors here.
"""

import inspect
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from recoup.tasks.assets import PREFIX, locate

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # never pickle
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "*.bpe.model", "spiece.model")


def model_folder(model: str, folder: Path) -> Path:
    """The folder of a model that a recipe names.

    A hub id is only what cannot be a path here: "name" or "owner/name", neither of which exists in `folder`.

    Args:
        model: a path, a hub id or "asset:NAME".
        folder: where relative paths start.

    Raises:
        FileNotFoundError: nothing there, or the hub does not give it.
    """
    path = locate(model, folder)
    if path.is_dir():
        return path
    owner = model.partition("/")[0]
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) and not (folder / owner).exists()
    if model.startswith(PREFIX) or not hub_id:
        raise FileNotFoundError(
            f"task.model: {model} asked, no folder {path.resolve()}; "
            "write the path of a folder made by save_pretrained, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"task.model: {model} is no folder in {folder.resolve()}, and the hub does not give it "
            f"({str(error).splitlines()[0]}); download it first and write its path"
        ) from None


def check(folder: Path) -> None:
    """Every file of a model is there, and every safetensors file is as long as its header says.

    Raises:
        ValueError: a file is damaged.
        FileNotFoundError: a file is missing.
    """
    wanted = {("config.json",): "config", TOKENIZERS: "tokenizer", ("*.safetensors",): "weights"}
    for patterns, what in wanted.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise FileNotFoundError(
                f"task.model: no {what} in {folder} (none of {', '.join(patterns)}); "
                "save model and tokenizer there with save_pretrained"
            )
    for path in sorted(folder.glob("*.safetensors")):
        _check_length(path)


def files_of(folder: Path) -> list[Path]:
    """The files that make the model and its tokenizer what they are."""
    return sorted(path for pattern in FILES for path in folder.glob(pattern))


def load_encoder(folder: Path) -> tuple[nn.Module, list[str]]:
    """The encoder in float32 and eval mode, and the names of stored tensors that it has no use for.

    It has no pooler where the class can leave it out: mean pooling never asks it, and nobody should
    calibrate, train and ship a layer that is not used. Attention is the eager one: exported to ONNX it is
    two plain matrix products per layer, while `sdpa` adds shape arithmetic and a NaN guard to each.

    Raises:
        ValueError: transformers cannot make this model, or weights are missing in the files.
    """
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel

    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            encoder = cast(Any, MODEL_MAPPING)[type(config)]  # a tuple where one config has several models
            if inspect.isclass(encoder) and "add_pooling_layer" in inspect.signature(encoder).parameters:
                options["add_pooling_layer"] = False
            model, found = AutoModel.from_pretrained(folder, config=config, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{folder}: transformers cannot load it ({str(error).strip().splitlines()[0]})"
            ) from error
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} weights are missing or misshapen, the first {absent[0]}; "
            "the files are of another model than config.json"
        )
    return model.eval(), sorted(found["unexpected_keys"])


def load_tokenizer(folder: Path, model: nn.Module, max_tokens: int) -> Any:
    """The tokenizer, known to fit the model.

    Raises:
        ValueError: it cannot pad, has more words than the model, or the model is too short for `max_tokens`.
    """
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"{folder}: transformers cannot load its tokenizer ({str(error).strip().splitlines()[0]})"
            ) from error
    config: Any = model.config
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder}: the tokenizer has no padding token; set pad_token and save it again")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} words, the model {config.vocab_size}; "
            "they are not of the same model"
        )
    longest = getattr(config, "max_position_embeddings", max_tokens)
    if max_tokens > longest:
        raise ValueError(f"task.max_tokens: {max_tokens} asked, the model takes {longest} at most")
    return tokenizer


def _check_length(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, a JSON header, and the tensors it lists."""
    found = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < found else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: not a safetensors file ({found} bytes, no readable header); "
            "fetch it again (a git-lfs pointer needs `git lfs pull`)"
        ) from None
    expected = 8 + length + max(ends, default=0)
    if found != expected:
        raise ValueError(
            f"{path}: {expected} bytes expected, {found} found; the file is damaged, fetch it again"
        )


@contextmanager
def _quiet() -> Generator[None]:
    """No loading bar and no table of unused weights: what matters of them is in the facts of the task."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
