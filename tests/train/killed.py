"""A training with everything that has state, killed at every point. Run by test_checkpoints.py."""

import json
import sys
from pathlib import Path

import torch

from recoup import train
from recoup.train.fingerprint import fingerprint
from tests import killing
from tests.train.test_train import batches, prepared, settings


def work(folder: Path) -> None:
    """Dropout, learned scales, accumulation, a late start, looks, drawn codes, more bits at first."""
    torch.manual_seed(0)
    model, data = prepared("w2a8", weight_ranges="learned", dropout=0.5), batches(5, labels=True)
    given = settings(steps=9, accumulate=2, loss={"task": 0.5, "logits-kl": 0.5}, start_step=1, warmup=2,
                     evaluate_every=1, early_stop=3, checkpoint_every=2, learning_rate=3e-3,
                     rounding="stochastic", progressive=[4])  # fmt: skip
    told: list[dict[str, float]] = []

    def record(entry: dict[str, float]) -> None:
        killing.point()
        told.append(entry)

    train(model, data[1:], given, held_out=data[:1], record=record, checkpoints=folder / "checkpoints")
    (folder / "told.json").write_text(json.dumps([told, fingerprint(model.state_dict())]))


def outcome(folder: Path) -> tuple[str, int]:
    """All that was told, and the weights; and how many checkpoints are left."""
    return (folder / "told.json").read_text(), len(list((folder / "checkpoints").iterdir()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    points, lost = killing.killed_everywhere(work, place, outcome, every=int(sys.argv[2]))
    print(json.dumps({"points": points, "lost": lost, "told": (place / "whole" / "told.json").read_text()}))
