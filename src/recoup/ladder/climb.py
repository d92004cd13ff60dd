"""The climb: rung after rung on one prepared model, a gate after each, until one passes."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recoup.calibrate import calibrate
from recoup.ladder.run_folder import RunFolder
from recoup.nn import Batch, FakeQuantizer
from recoup.schemes import Recipe
from recoup.train import train as train_under_quantization
from recoup.validate import Gate, Rung, Samples, outcome_of
from recoup.validate.layers import layer_errors

Evaluate = Callable[[nn.Module], Samples | Mapping[str, Any]]


class Climb:
    """The rungs of a recipe.

    After `to_the_first_that_passes`: `rungs` are the attempts, `curve` the training entries, `errors` the
    error that quantization adds in every module, by rung.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        gates: list[Gate],
        before: Samples,
        evaluate: Evaluate,
        calibration: Sequence[Batch],
        train: Sequence[Batch],
        run: RunFolder,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.recipe, self.run, self.say = model, recipe, run, say
        self.gates, self.before, self.evaluate = gates, before, evaluate
        self.calibration, self.train = calibration, train
        self.rungs: list[Rung] = []
        self.curve: list[dict[str, float]] = []
        self.errors: dict[str, dict[str, float]] = {}
        self.climb: dict[str, Callable[[], None]] = {
            "rtn": lambda: self._calibrate("minmax"),
            "mse": lambda: self._calibrate("mse"),
            "qat": self._train,
        }

    def to_the_first_that_passes(self) -> Rung:
        """The first rung that passes, or else the best; the model is left as that rung made it."""
        best: Rung | None = None
        state: dict[str, Tensor] = {}
        for name in self.recipe.rungs:
            rung = self._measured(name)
            if best is None or _merit(rung) > _merit(best):
                best, state = rung, _moving_state(self.model, weights="qat" in self.recipe.rungs)
            else:  # qat starts from the better calibration, and a worse qat is not kept
                self.model.load_state_dict(state, strict=False)
            if rung.outcome == "passed":
                break
        assert best is not None
        return best

    def _measured(self, name: str) -> Rung:
        self.say(f"rung {name}")
        start = time.monotonic()
        self.climb[name]()
        after = Samples.of(self.evaluate(self.model))
        verdicts = [gate.check(self.before, after) for gate in self.gates]
        rung = Rung(
            name=name,
            metrics=after.summary(),
            verdicts=verdicts,
            seconds=time.monotonic() - start,
            outcome=outcome_of(verdicts),
        )
        self.rungs.append(rung)
        self.errors[name] = layer_errors(self.model, self.calibration[0])
        self.run.record("rung", **rung_json(rung))
        for verdict in verdicts:
            self.say(f"  {verdict}")
        return rung

    def _calibrate(self, observer: str) -> None:
        calibrate(self.model, self.calibration, observer=observer, samples=self.recipe.calibration.samples)

    def _train(self) -> None:
        if not self.rungs:
            self._calibrate("mse")
        settings = self.recipe.train
        held_out = min(max(1, round(settings.held_out * len(self.train))), len(self.train) - 1)

        def record(entry: Mapping[str, float]) -> None:
            self.curve.append(dict(entry))
            self.run.record("train", **entry)

        train_under_quantization(
            self.model, self.train[held_out:], settings, held_out=self.train[:held_out], record=record
        )


def rung_json(rung: Rung) -> dict[str, Any]:
    """A rung as plain data."""
    return {
        "name": rung.name,
        "outcome": rung.outcome,
        "metrics": rung.metrics,
        "verdicts": [verdict.to_json() for verdict in rung.verdicts],
        "seconds": round(rung.seconds, 3),
    }


def _merit(rung: Rung) -> tuple[int, float]:
    """Outcome first, then the gate with the least room, in units of its limit."""
    order = {"failed": 0, "undecided": 1, "passed": 2}
    room = [
        1 - (v.change if v.direction == "increase" else -v.change) / max(v.limit, 1e-12)
        for v in rung.verdicts
    ]
    return order[rung.outcome], min(share if math.isfinite(share) else -math.inf for share in room)


def _moving_state(model: nn.Module, *, weights: bool) -> dict[str, Tensor]:
    """A copy of what the rungs change: the ranges, and the weights where one of them trains."""
    ranges = {name for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in model.state_dict().items()
        if weights or name.rpartition(".")[0] in ranges
    }
