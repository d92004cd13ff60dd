"""A target and a report that cost nothing: the ladder's tests are about the ladder."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recoup.export import TARGETS, Parity
from recoup.validate import Cost, Report, markdown

# Of a model so small that its files may take any time: what is slower is looked for nowhere else.
SLOWER = "ignore:in .* the artefact is slower than the float model"
COST = Cost(bytes=400, seconds=0.004, peak_bytes=10**6, batch="2 x 32")


def alone(patch: pytest.MonkeyPatch) -> None:
    """No other target is installed."""
    patch.setattr("recoup.ladder.other_targets.TARGETS", {})


def install(patch: pytest.MonkeyPatch, **milliseconds: float) -> None:
    """A target in the place of onnx that writes the model with torch.save; a report without pictures.

    Args:
        patch: undoes it.
        milliseconds: that a quantized file takes in a target, of which pytorch writes the same then, and gguf
            runs nothing; a float file takes 4, and so does a quantized one by default.
    """

    def write(model: nn.Module, folder: Path, example: Any) -> None:
        torch.save(model, folder / "model.pt")

    def costs(name: str) -> Any:
        quantized = replace(COST, seconds=milliseconds.get(name, 4.0) / 1000)
        return lambda folders, batch: (COST, quantized)

    def refuse(*_: Any) -> None:
        raise ValueError("no llama.cpp architecture")

    def report(record: Report, folder: Path) -> None:
        (folder / "report.md").write_text(markdown(record))
        (folder / "report.html").write_text("no pictures")

    patch.setitem(
        TARGETS,
        "onnx",
        replace(
            TARGETS["onnx"],
            write=write,
            compare=lambda *_: Parity(modules=2, codes=1, scales=1, worst_module=0.0, end_to_end=0.0),
            load=lambda folder: torch.load(folder / "model.pt", weights_only=False),
            costs=costs("onnx"),
        ),
    )
    patch.setitem(TARGETS, "pytorch", replace(TARGETS["pytorch"], write=write, costs=costs("pytorch")))
    patch.setitem(TARGETS, "gguf", replace(TARGETS["gguf"], check=refuse))
    patch.setattr(importlib.import_module("recoup.ladder.ladder"), "write", report)
