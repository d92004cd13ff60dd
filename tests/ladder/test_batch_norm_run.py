"""A run whose qat keeps norms inside of the layers that they were folded into."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recoup import Result, recover

from .conftest import WIDTH, Classifier, batches, recipe, scripted

TRAIN = {
    "steps": 4, "learning_rate": 1e-2, "loss": "logits-kl", "evaluate_every": 2,
    "batch_norm": {"freeze": 2, "reestimate": 3},
}  # fmt: skip


def normed() -> nn.Module:
    """The classifier, with a norm that has statistics."""
    torch.manual_seed(0)
    model = Classifier()
    model.up = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    for batch in batches(4):
        model(**batch)
    return model.eval()


@pytest.mark.usefixtures("quick")
def test_a_run_ships_one_folded_layer_and_goes_on_in_parts(tmp_path: Path) -> None:
    def go(folder: Path, *right: int, **more: Any) -> Result:
        model = normed()
        data = batches(8)
        return recover(
            model, recipe(rungs=["rtn", "qat"], train=TRAIN), calibration=data[:4], train=data,
            evaluate=scripted(*right), folder=folder, **more,
        )  # fmt: skip

    whole = go(tmp_path / "whole", 100, 50, 99, 99)
    go(tmp_path / "parts", 100, 50, part="ptq")
    parts = go(tmp_path / "parts", 99, part="qat")
    assert (whole.outcome, whole.rung) == (parts.outcome, parts.rung) == ("passed", "qat")
    one, other = whole.model.state_dict(), parts.model.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any("norm" in name for name in one)
    assert [entry for entry in whole.record.curve if "reestimated" in entry] != []
