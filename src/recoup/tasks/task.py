"""What a task gives to a run, and how a model is asked without leaving a trace on it."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from recoup.nn import device_of
from recoup.validate import Samples

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, what it is calibrated and trained on, and how it is measured.

    Args:
        model: the float model, in eval mode.
        calibration: batches that hold exactly `recipe.calibration.samples` samples together.
        train: batches in the order of training.
        evaluate: calls `model(**batch)` on fixed inputs; the same inputs and order for every model.
        baseline: what `evaluate(model)` gives, where loading has measured it already.
        facts: what a report needs to say which model and data these were: sha256 of the files, counts.
    """

    model: nn.Module
    calibration: Sequence[Batch]
    train: Sequence[Batch]
    evaluate: Callable[[nn.Module], Samples]
    facts: dict[str, str]
    baseline: Samples | None = None


@contextmanager
def asking(model: nn.Module) -> Generator[torch.device]:
    """Eval and inference mode inside; every training flag as it was after. Gives the model's device.

    A module without parameters and buffers (one that runs an exported file) is on the CPU.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield device_of(model)
    finally:
        for module, training in modes.items():
            module.training = training


def need(asked: str, extra: str, *packages: str) -> None:
    """Packages that what was asked imports later are there now.

    Raises:
        ImportError: one is not; the message names the extra of recoup that brings it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"{asked} needs {package}: pip install 'recoup[{extra}]'", name=package)


def too_few(asked: int, found: int, where: str) -> ValueError:
    """The error of a calibration set that is too small."""
    return ValueError(
        f"calibration: {asked} samples asked, {found} found in {where}; "
        "give it more, or lower calibration.samples"
    )


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
