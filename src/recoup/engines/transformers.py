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

from recoup.engines.safetensors_file import check_safetensors
from recoup.engines.transformers_experts import load_as_linears, quantized_experts

UNMEASURED = (
    "the folder ran in transformers, which decompresses the weights first; serve it with vLLM to measure them"
)


def load(folder: Path) -> nn.Module:
    """The model in the folder, decompressed, computing in float32; called as the float model is.

    Quantized experts are the Linears that the folder has, with quantized inputs where it says so.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: transformers does not know the model, or the folder does not hold its weights.
        ImportError: the extra is not installed.
    """
    return _load(folder, experts_are_linears=True)


def load_stacks(folder: Path) -> nn.Module:
    """The same as `from_pretrained` alone has it: experts are stacks, whose inputs stay in float.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `load`.
    """
    return _load(folder, experts_are_linears=False)


def _load(folder: Path, *, experts_are_linears: bool) -> nn.Module:
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; expected a folder of transformers")
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "running a transformers folder needs transformers: pip install 'recoup[compressed-tensors]'"
        ) from None
    architecture = _architecture(file)
    kind: Any = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{file}: transformers has no class {architecture}; write the folder again, or update"
        )
    check_safetensors(folder)
    with silent():
        experts = quantized_experts(kind, folder) if experts_are_linears else {}
        if experts:
            model, loaded = load_as_linears(kind, folder, experts)
        else:
            both: Any = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
            model, loaded = both
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


def kernel_of(config: Any) -> str | None:
    """The repository of the hub from which a config wants its attention computed; None for none."""
    named = [config.get(key) for key in ("attn_implementation", "_attn_implementation")]
    return next((name for name in named if isinstance(name, str) and "/" in name), None)


def _architecture(file: Path) -> str:
    try:
        config = json.loads(file.read_bytes())
        architecture, kernel = config["architectures"][0], kernel_of(config)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{file}: not the config of a model; write the folder again") from None
    if not isinstance(architecture, str):
        raise ValueError(f"{file}: not the config of a model; write the folder again")
    if kernel is not None:
        raise ValueError(
            f"{file}: its attention is code of {kernel}, which is not run; take attn_implementation out"
        )
    return architecture


def _complete(folder: Path, loaded: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[what])):
            raise ValueError(
                f"{folder}: {len(names)} {what.replace('_', ' ')} ({names[0]}); these are not the weights of "
                "the model in config.json"
            )
