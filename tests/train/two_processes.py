"""One of two processes that train one model together. Run under torchrun by test_processes.py."""

import json
import os
import sys
from pathlib import Path

import torch

from recoup import train
from recoup.train import fingerprint
from tests.train.test_train import batches, prepared, settings


class StopError(Exception):
    pass


def trained(folder: Path, stop: int | None = None) -> tuple[str, list[dict[str, float]]]:
    """Train, or give up at a step: the weights, and what was told."""
    torch.manual_seed(0)
    model, data = prepared(weight_ranges="learned", dropout=0.5), batches(9, labels=True)
    told: list[dict[str, float]] = []

    def record(entry: dict[str, float]) -> None:
        told.append(entry)
        if entry["step"] == stop:
            raise StopError

    torch.manual_seed(int(os.environ["RANK"]))  # each process drops other activations
    given = settings(steps=4, accumulate=2, loss="task", checkpoint_every=1)
    train(model, data, given, record=record, checkpoints=folder)
    return fingerprint(model.state_dict()), told


def main(folder: Path) -> None:
    """The same training whole, and in two parts."""
    whole = trained(folder / "whole")
    try:
        trained(folder / "stopped", stop=3)
    except StopError:
        again = trained(folder / "stopped")
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([whole, again]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
