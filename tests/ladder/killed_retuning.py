"""A run that is re-tuned by real trainings, killed at some points. Run by test_retune.py."""

import json
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn

from recoup import Samples
from tests import killing

from .conftest import recipe
from .killed import Run, outcome
from .stand_in import install


class Retuned(Run):
    """Nothing quantized can pass, so every way is gone to its end."""

    def __init__(self) -> None:
        super().__init__()
        gate = {"metric": "accuracy", "max_decrease": "0%", "interval": "none"}
        train = {
            "steps": 8,
            "learning_rate": 1e-4,
            "evaluate_every": 4,
            "checkpoint_every": 4,
            "budget": "9h",
        }
        self.recipe = recipe("w4a8", rungs=["qat"], gates=[gate], train=train, weight_ranges="learned")

    def evaluate(self, model: Any) -> Samples:
        """As measured, and one more is wrong of a quantized model."""
        right = torch.from_numpy(super().evaluate(model).values["accuracy"]).double()
        if type(model.up) is not nn.Linear:
            right[right.argmax()] = 0
        return Samples({"accuracy": right.numpy()})


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """Without the times of the tries."""
    retuning = found["run"]["retuning"]
    for timed in (retuning, *retuning["tries"]):
        timed.pop("seconds")
    for event in found["events"]:
        event.pop("took", None)
    return found


def main(folder: Path, every: int) -> None:
    """Kill it, and print what was lost."""

    def left(at: Path) -> dict[str, Any]:
        return timeless(outcome(at))

    with pytest.MonkeyPatch.context() as patch:
        install(patch, onnx=5.0, pytorch=3.0)
        points, lost = killing.killed_everywhere(Retuned(), folder, left, every)
    print(json.dumps({"points": points, "lost": lost, **left(folder / "whole")}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
