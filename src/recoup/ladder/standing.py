"""How far a run has come: everything that is finished, as data, so that nothing finished is done again."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recoup.schemes import Recipe
from recoup.validate import Cost, Rung, Verdict

Part = Literal["ptq", "qat", "export", "validate"]


@dataclass
class Standing:
    """What a run has finished.

    Args:
        step: so many are finished.
        seconds: what it took so far.
        lines: of metrics.jsonl that belong to finished steps.
        rungs: measured, in the order in which they were climbed.
        errors: rung -> module -> the error that quantization adds.
        curve: of the training, an entry for each step.
        exported: the rung that the artefact was made of; None without one.
        parity: how close the file is to what was trained, in words.
        artefact: the exported file, measured.
        costs: of the float file and of the exported one.
    """

    step: int = 0
    seconds: float = 0.0
    lines: int = 0
    rungs: list[Rung] = field(default_factory=list[Rung])
    errors: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    exported: str | None = None
    parity: str = ""
    artefact: Rung | None = None
    costs: tuple[Cost, Cost] | None = None

    @property
    def best(self) -> Rung | None:
        """The rung that would be shipped: of equals the first, which is the cheapest."""
        return max(self.rungs, key=_merit, default=None)

    def drop_artefact(self) -> None:
        """Count none as exported: what is there is gone, or was made of a rung that is not the best now."""
        self.exported = self.artefact = self.costs = None

    def left(self, rungs: tuple[str, ...]) -> list[str]:
        """Those of the rungs that are still to be climbed; none once one has passed."""
        if self.best is not None and self.best.outcome == "passed":
            return []
        return [name for name in rungs if name not in {rung.name for rung in self.rungs}]

    def outcome(self, part: Part, recipe: Recipe) -> str | None:
        """The outcome of a part of the run; None while it is not done."""
        if self.best is None or (part in ("ptq", "qat") and self.left(rungs_of(part, recipe))):
            return None
        if part in ("ptq", "qat"):
            return self.best.outcome
        if self.exported != self.best.name:
            return None
        if part == "export":
            return self.best.outcome
        return None if self.artefact is None or self.costs is None else self.artefact.outcome

    def to_json(self) -> dict[str, Any]:
        """Plain values, not-a-numbers included."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Standing":
        """What `to_json` gave."""
        artefact, costs = data["artefact"], data["costs"]
        restored: dict[str, Any] = {
            "rungs": [_rung(rung) for rung in data["rungs"]],
            "artefact": None if artefact is None else _rung(artefact),
            "costs": None if costs is None else (Cost(**costs[0]), Cost(**costs[1])),
        }
        return cls(**(data | restored))


def rungs_of(part: Part | None, recipe: Recipe) -> tuple[str, ...]:
    """The rungs of the recipe that a part of the run climbs.

    Raises:
        ValueError: the recipe has none for it.
    """
    if part in ("export", "validate"):
        return ()
    calibrated = tuple(name for name in recipe.rungs if name != "qat")
    if part == "ptq" and not calibrated:
        raise ValueError("rungs: the recipe calibrates nothing by itself; add rtn or mse, or run recoup qat")
    if part == "qat" and len(calibrated) == len(recipe.rungs):
        raise ValueError("rungs: the recipe trains nothing; add qat to them")
    return calibrated if part == "ptq" else recipe.rungs


def _rung(data: dict[str, Any]) -> Rung:
    verdicts: Any = [Verdict(**verdict) for verdict in data["verdicts"]]
    return Rung(**(data | {"verdicts": verdicts}))


def _merit(rung: Rung) -> tuple[int, float]:
    """Outcome first, then the gate with the least room, in units of its limit."""
    order = {"failed": 0, "undecided": 1, "passed": 2}
    room = [
        1 - (v.change if v.direction == "increase" else -v.change) / max(v.limit, 1e-12)
        for v in rung.verdicts
    ]
    return order[rung.outcome], min(share if math.isfinite(share) else -math.inf for share in room)
