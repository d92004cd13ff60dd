"""transformers: load a folder with quantized weights, as users do, and run it on the CPU.

transformers decompresses the weights to dense matrices before it runs them, and quantizes inputs in Python
as the library behind the format does. So it shows what the numbers in the folder mean, and nothing of the
size in memory or the speed that an engine with kernels for the format has.
"""

import contextlib
import io
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn

UNMEASURED = (
    "the folder ran in transformers, which decompresses the weights first; serve it with vLLM to measure them"
)


def load(folder: Path) -> nn.Module:
    """The model in the folder, decompressed, computing in float32; called as the float model is.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: transformers does not know the model, or the folder does not hold its weights.
        ImportError: the extra is not installed.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; expected a folder of transformers")
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "running a transformers folder needs transformers: pip install 'recoup[compressed-tensors]'"
        ) from None
    architecture = json.loads(file.read_text())["architectures"][0]
    if not hasattr(transformers, architecture):
        raise ValueError(
            f"{file}: transformers has no class {architecture}; write the folder again, or update"
        )
    with silent():
        model, loaded = getattr(transformers, architecture).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        _complete(folder, loaded)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:  # otherwise at the first call, with a bar
            quantizer.compressor.decompress_model(model)
    return nn.Module.float(model).eval()  # 4-bit floats come out in bfloat16; its own `float` refuses


def size_bytes(folder: Path) -> int:
    """Bytes on disk of the weights, without config, tokenizer and reports."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Transformers without its bars and tables inside; only errors are logged. As it was after."""
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


@contextlib.contextmanager
def silent() -> Generator[None]:
    """`quiet`, and nothing on stderr: compressed-tensors cannot be told to draw no bars."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _complete(folder: Path, loaded: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[what])):
            raise ValueError(
                f"{folder}: {len(names)} {what.replace('_', ' ')} ({names[0]}); these are not the weights of "
                "the model in config.json"
            )
