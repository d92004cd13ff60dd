"""How far a run has come: everything that is finished, as data, so that nothing finished is done again."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recoup.schemes import Recipe
from recoup.validate import Cost, Rung, Verdict
from recoup.validate.report import duration, latencies
from recoup.validate.symptoms import Symptom
from recoup.validate.tries import Try

Part = Literal["ptq", "qat", "export", "validate"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Another target, measured because the artefact is slower than the float model in its own.

    Args:
        target: its name.
        scheme: the schemes that it was measured with; empty where it was not.
        costs: of the float file and of the quantized one there; None where it was not measured.
        refused: why not.
        seconds: what it took to find out.
    """

    target: str
    scheme: str = ""
    costs: tuple[Cost, Cost] | None = None
    refused: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.costs is None:
            return f"{self.target}: {self.refused}"
        before, after = map(duration, latencies(self.costs))
        return f"{self.target} with {self.scheme} ({after}, in float {before})"


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
        symptoms: that the training showed.
        exported: the rung that the artefact was made of; None without one.
        parity: how close the file is to what was trained, in words.
        artefact: the exported file, measured.
        costs: of the float file and of the exported one.
        others: targets that were measured because the artefact is slower than the float file.
        compared: none is left to be measured.
        tries: of re-tuning, the recipe's own training first; none without a budget.
        retuned: re-tuning is over.
        advice: what it would have gone on with.
    """

    step: int = 0
    seconds: float = 0.0
    lines: int = 0
    rungs: list[Rung] = field(default_factory=list[Rung])
    errors: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    symptoms: list[Symptom] = field(default_factory=list[Symptom])
    exported: str | None = None
    parity: str = ""
    artefact: Rung | None = None
    costs: tuple[Cost, Cost] | None = None
    others: list[Trial] = field(default_factory=list[Trial])
    compared: bool = False
    tries: list[Try] = field(default_factory=list[Try])
    retuned: bool = False
    advice: list[str] = field(default_factory=list[str])

    @property
    def best(self) -> Rung | None:
        """The rung that would be shipped: of equals the first, which is the cheapest."""
        return max(self.rungs, key=_merit, default=None)

    @property
    def raised(self) -> dict[str, str]:
        """Module -> its preset, of those that the best rung has with more bits than the recipe."""
        return next((one.raised for one in self.tries if self.best and one.name == self.best.name), {})

    def retunes(self, part: Part | None, recipe: Recipe) -> bool:
        """Has this part of the run a re-tuning, and is it not over?"""
        asked = recipe.train.budget is not None and part in (None, "qat")
        return asked and not self.retuned and (self.best is None or self.best.outcome != "passed")

    def drop_artefact(self) -> None:
        """Count none as exported: what is there is gone, or was made of a rung that is not the best now."""
        self.exported = self.artefact = self.costs = None
        self.others, self.compared = [], False

    def left(self, rungs: tuple[str, ...]) -> list[str]:
        """Those of the rungs that are still to be climbed; none once one has passed."""
        if self.best is not None and self.best.outcome == "passed":
            return []
        return [name for name in rungs if name not in {rung.name for rung in self.rungs}]

    def outcome(self, part: Part, recipe: Recipe) -> str | None:
        """The outcome of a part of the run; None while it is not done."""
        if self.best is None or (part in ("ptq", "qat") and self.left(rungs_of(part, recipe))):
            return None
        if self.retunes(part, recipe):
            return None
        if part in ("ptq", "qat"):
            return self.best.outcome
        if self.exported != self.best.name:
            return None
        if part == "export":
            return self.best.outcome
        return self.artefact.outcome if self.artefact is not None and self.compared else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, not-a-numbers included."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Standing":
        """What `to_json` gave."""
        artefact, costs = data["artefact"], data["costs"]
        restored: dict[str, Any] = {
            "rungs": [_rung(rung) for rung in data["rungs"]],
            "symptoms": [Symptom(**symptom) for symptom in data["symptoms"]],
            "tries": [Try(**one) for one in data.get("tries", [])],
            "artefact": None if artefact is None else _rung(artefact),
            "costs": _costs(costs),
            "others": [Trial(**(trial | {"costs": _costs(trial["costs"])})) for trial in data["others"]],
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


def _costs(pair: Any) -> tuple[Cost, Cost] | None:
    return None if pair is None else (Cost(**pair[0]), Cost(**pair[1]))


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
