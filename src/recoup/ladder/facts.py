"""What a reader needs to know to repeat a run: versions, machine, seed, and checksums of model and data."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from recoup.nn import Batch
from recoup.schemes import Recipe
from recoup.train import fingerprint

_PACKAGES = ("recoup", "torch", "transformers", "accelerate", "onnx", "onnxruntime", "numpy")


def facts_of(
    model: nn.Module, calibration: Sequence[Batch], train: Sequence[Batch], recipe: Recipe
) -> dict[str, str]:
    """Everything by name, as text."""
    return {
        "seed": str(recipe.seed),
        "sha256 of the float weights": fingerprint(model.state_dict()),
        "sha256 of the calibration batches": fingerprint(calibration),
        "sha256 of the training batches": fingerprint(train),
        "machine": f"{_processor()}, {platform.system()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: found for package in _PACKAGES if (found := _version(package))},
    }


def identity_of(facts: Mapping[str, str]) -> dict[str, str]:
    """Those facts that a run cannot go on without: the checksums of its model and of its data."""
    return {name: fact for name, fact in facts.items() if "sha256" in name}


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
