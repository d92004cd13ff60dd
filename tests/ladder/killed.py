"""A run through every rung, killed at every point. Run by test_resume.py."""

import json
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recoup import Samples, recover
from recoup.ladder import outcome_of_part
from recoup.train import fingerprint
from tests import killing

from .conftest import Classifier, batches, labels, recipe
from .stand_in import install


def fitted() -> dict[str, Any]:
    """A trained classifier, as its state."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in batches(200, 64):
        F.cross_entropy(model(**batch)["logits"], labels(batch["x"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


class Run:
    """The same run again and again: the first two rungs fail, the third trains, the file is measured."""

    def __init__(self) -> None:
        self.state = fitted()
        self.unseen, self.seen = batches(4, 64), batches(12)
        gate = {"metric": "accuracy", "max_decrease": "1.5%", "interval": "none"}
        train = {"steps": 6, "learning_rate": 2e-3, "evaluate_every": 2, "checkpoint_every": 3}
        self.recipe = recipe("w2a8", gates=[gate], train=train, weight_ranges="learned", smooth=True)

    def evaluate(self, model: nn.Module) -> Samples:
        """Right or wrong, sample by sample."""
        killing.point()
        with torch.no_grad():
            right = [model(**b)["logits"].argmax(dim=1) == labels(b["x"]) for b in self.unseen]
        return Samples({"accuracy": torch.cat(right).numpy()}, {"first": torch.arange(256).numpy() < 9})

    def __call__(self, folder: Path) -> None:
        """The work: it goes on where the folder says."""
        if outcome_of_part(folder, self.recipe, None) is not None:
            return
        model = Classifier()
        model.load_state_dict(self.state)
        torch.manual_seed(9)
        keywords: dict[str, Any] = {
            "calibration": self.seen[:4],
            "train": self.seen,
            "evaluate": self.evaluate,
        }
        recover(model.eval(), self.recipe, folder=folder, **keywords)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run left, but for times."""
    found = {path.name for path in folder.iterdir()}
    run = json.loads((folder / "run.json").read_text())
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for timed in (run, *run["rungs"], *events):
        timed.pop("seconds")
    artefact = folder / "artefact" / "model.pt"
    shipped = torch.load(artefact, weights_only=False).state_dict() if artefact.exists() else {}
    return {"files": sorted(found), "run": run, "events": events, "artefact": fingerprint(shipped)}


def main(folder: Path, every: int) -> None:
    """Kill it everywhere, and print what was lost."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, onnx=5.0, pytorch=3.0)
        points, lost = killing.killed_everywhere(Run(), folder, outcome, every)
    print(json.dumps({"points": points, "lost": lost, **outcome(folder / "whole")}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
