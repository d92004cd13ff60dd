"""The climb: rung after rung on one prepared model, a gate after each, until one passes."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.calibrate import calibrate, correct_biases, gptq
from recoup.export import target_named
from recoup.ladder.run_folder import RunFolder
from recoup.ladder.tries import at_rate, falls, lowest
from recoup.nn import Batch, FakeQuantizer, without_labels
from recoup.schemes import Recipe, TrainSettings
from recoup.train import NonFiniteLossError, float_copy
from recoup.train import train as train_under_quantization
from recoup.train.snapshot import state_of
from recoup.validate import Gate, Rung, Samples, outcome_of
from recoup.validate.layers import layer_errors
from recoup.validate.modes import evaluation
from recoup.validate.tries import Try

Evaluate = Callable[[nn.Module], Samples | Mapping[str, Any]]
OBSERVERS = {"rtn": "minmax"} | {name: name for name in ("moving-average", "percentile", "kl", "mse")}


class Climb:
    """The rungs of a recipe, each a step of the run that is not done again.

    Args:
        model: prepared. What the best rung so far made of it is loaded from the run.
        recipe: of the run.
        gates: that every rung is asked.
        before: what the float model scored.
        evaluate: the measurement.
        calibration, train: batches.
        run: the folder; what it says is finished stays so.
        say: is told what happens.
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
        self.settle = target_named(recipe.export.target).settle
        self.error = ""  # that ended the recipe's training
        self.retunes = recipe.train.budget is not None
        # These move the float model: no student could follow what it is after them.
        self.moving = {"gptq", "bias", "qat"} & set(recipe.rungs)
        self.teacher = float_copy(model) if self.retunes or len(self.moving) > 1 else None
        if run.state:  # without calibration, which leaves the example too
            model.recoup_example = without_labels(calibration[0])  # pyright: ignore[reportArgumentType]
            self.to_the_best()

    def up(self, rungs: tuple[str, ...]) -> Rung | None:
        """Climb until a rung passes; the best so far. The model is left as that one made it."""
        standing = self.run.standing
        for name in standing.left(rungs):
            if name not in standing.left(rungs):
                break  # the one before it passed
            rung = self.measured(name, partial(self._climb, name))
            if name == "qat" and self.retunes:
                self.run.standing.tries.append(self._tried(rung))
            self.keep(rung)
            if name == "qat":
                shutil.rmtree(self.run.training, ignore_errors=True)
        return standing.best

    def measured(self, name: str, change: Callable[[], None]) -> Rung:
        """A rung: the model is changed, measured, and the gates are asked."""
        self.say(f"rung {name}")
        start = time.monotonic()
        torch.manual_seed(self.recipe.seed)  # a rung draws the same numbers, whatever was before it
        change()
        after = measured(self.evaluate, self.model)
        verdicts = [gate.check(self.before, after) for gate in self.gates]
        rung = Rung(
            name=name,
            metrics=after.summary(),
            verdicts=verdicts,
            seconds=time.monotonic() - start,
            outcome=outcome_of(verdicts),
        )
        self.run.standing.rungs.append(rung)
        self.run.standing.errors[name] = layer_errors(self.model, self.calibration[0])
        self.run.record("rung", **rung_json(rung))
        for verdict in verdicts:
            self.say(f"  {verdict}")
        return rung

    def keep(self, rung: Rung) -> None:
        """End the step of a rung: what it made of the model stays if it is the best, or else goes."""
        if self.run.standing.best is rung:
            self.take()
        else:  # qat starts from the better calibration, and a worse qat is not kept
            self.to_the_best()
        self.run.save()

    def take(self) -> None:
        """The model as it is now becomes what the best rung made of it."""
        self.run.state = _moving_state(self.model, weights=bool(self.moving))

    def fit(self, settings: TrainSettings, folder: Path, curve: list[dict[str, float]], **told: Any) -> None:
        """Train the model as it is.

        Args:
            settings: of this training.
            folder: of its checkpoints.
            curve: gets the record of it, up to where it ends or breaks off.
            told: more to say in every line of metrics.jsonl.
        """
        held_out = min(max(1, round(settings.held_out * len(self.train))), len(self.train) - 1)

        def record(entry: Mapping[str, float]) -> None:
            curve.append(dict(entry))
            self.run.record("train", **told, **entry)
            if "stopped_early" in entry:
                self.say(
                    f"  stopped at step {entry['step']:.0f} of {settings.steps}: {settings.early_stop} looks "
                    "without a lower held-out loss"
                )

        train_under_quantization(
            self.model,
            self.train[held_out:],
            settings,
            teacher=self.teacher,
            held_out=self.train[:held_out],
            record=record,
            checkpoints=folder,
        )

    def to_the_best(self) -> None:
        """The model as the best rung made it; it is prepared with the plan of that."""
        self.model.load_state_dict(dict(self.run.state), strict=False)

    def to_the_untrained(self) -> None:
        """The model as the recipe's training found it; it is prepared with the plan of the recipe."""
        assert self.teacher is not None
        for state in (self.teacher.state_dict(), self.run.untrained):  # whose ranges have one name if shared
            self.model.load_state_dict(dict(state), strict=False)

    def _climb(self, name: str) -> None:
        improves = name in ("bias", "qat")  # what the best rung so far made of the model
        if not (improves and self.run.standing.rungs):
            self._calibrate(OBSERVERS.get(name, "mse"))
        if name == "gptq":
            gptq(self.model, self.calibration, samples=self.recipe.calibration.samples)
        if name == "bias":
            correct_biases(self.model, self.calibration, teacher=self.teacher)
        if name == "qat":
            self._train()

    def _calibrate(self, observer: str) -> None:
        samples = self.recipe.calibration.samples
        self.settle(calibrate(self.model, self.calibration, observer=observer, samples=samples))

    def _train(self) -> None:
        standing, settings = self.run.standing, self.recipe.train
        if self.retunes:
            self.run.untrained = _moving_state(self.model, weights=self.moving > {"qat"})
        standing.curve, standing.symptoms = [], []
        try:
            self.fit(at_rate(settings, settings.learning_rate), self.run.training, standing.curve)
        except NonFiniteLossError as error:
            if not self.retunes:
                raise
            self.error = str(error)
            self.say(f"  {error}")
            self.to_the_untrained()
        else:
            standing.symptoms = getattr(self.model, "recoup_symptoms", [])

    def _tried(self, rung: Rung) -> Try:
        """The recipe's training, which re-tuning begins with."""
        standing, settings = self.run.standing, self.recipe.train
        return Try(
            kind="recipe",
            name=rung.name,
            why="as the recipe says",
            learning_rate=settings.learning_rate,
            steps=int(standing.curve[-1]["step"]) if standing.curve else 0,
            held_out=math.inf if self.error else lowest(standing.curve),
            falls=not self.error and falls(standing.curve),
            seconds=self.run.seconds_of_step,
            outcome=rung.outcome,
            error=self.error,
        )


def measured(evaluate: Evaluate, model: nn.Module) -> Samples:
    """What a model scores; refuses one that is measured in training mode."""
    with evaluation(model):
        return Samples.of(evaluate(model))


def rung_json(rung: Rung) -> dict[str, Any]:
    """A rung as plain data."""
    return {
        "name": rung.name,
        "outcome": rung.outcome,
        "metrics": rung.metrics,
        "verdicts": [verdict.to_json() for verdict in rung.verdicts],
        "seconds": round(rung.seconds, 3),
    }


def _moving_state(model: nn.Module, *, weights: bool) -> dict[str, Tensor]:
    """A copy of what the rungs change: the ranges, and the weights where one of them trains."""
    ranges = {name for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in state_of(model).items()
        if weights or name.rpartition(".")[0] in ranges
    }
