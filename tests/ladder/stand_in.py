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

COST = Cost(bytes=400, seconds=0.004, peak_bytes=10**6, batch="2 x 32")


def install(patch: pytest.MonkeyPatch) -> None:
    """A target in the place of onnx that writes the model with torch.save; a report without pictures."""

    def write(model: nn.Module, folder: Path, example: Any) -> None:
        torch.save(model, folder / "model.pt")

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
            costs=lambda folders, batch: (COST, COST),
        ),
    )
    patch.setattr(importlib.import_module("recoup.ladder.ladder"), "write", report)
