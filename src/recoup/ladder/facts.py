"""What a reader needs to know to repeat a run: versions, machine, seed, and checksums of model and data."""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from recoup.nn import Batch
from recoup.schemes import Recipe

_PACKAGES = ("recoup", "torch", "transformers", "accelerate", "onnx", "onnxruntime", "numpy")


def facts_of(model: nn.Module, batches: Iterable[Batch], recipe: Recipe) -> dict[str, str]:
    """Everything by name, as text."""
    return {
        "seed": str(recipe.seed),
        "sha256 of the float weights": _sha256(model.state_dict()),
        "sha256 of the calibration batches": _sha256(batches),
        "machine": f"{_processor()}, {platform.system()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: found for package in _PACKAGES if (found := _version(package))},
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sha256(values: object) -> str:
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for name, entry in value.items():  # pyright: ignore[reportUnknownVariableType]
                digest.update(str(name).encode())
                add(entry)
        elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            for entry in value:  # pyright: ignore[reportUnknownVariableType]
                add(entry)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()
