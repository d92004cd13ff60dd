"""Re-tuning: where the recipe's training misses a gate, what an engineer would do next, in a budget of time.

    search of a rate -> training with it -> more steps while the held-out loss falls -> more bits for a few

After each whole training the gates are asked, and the first that passes ends it. Every training is a step of
the run. What comes next follows from those that are finished, and the time that they took, alone: re-tuning
that was stopped goes on as if nothing had happened.
"""

import logging
import shutil
from dataclasses import asdict, replace

import torch
from torch import nn

from recoup.calibrate import calibrate
from recoup.ladder.climb import Climb
from recoup.ladder.raising import give, raised_further, raised_plan
from recoup.ladder.tries import (
    SEARCH,
    at_rate,
    expected_seconds,
    falls,
    found_rate,
    going_on,
    lowest,
    rates,
    searched,
    shares_of_error,
    shortened,
    spent,
    successive_halving,
)
from recoup.nn import FakeQuantizer
from recoup.schemes import Plan
from recoup.train import NonFiniteLossError
from recoup.validate import Rung
from recoup.validate.report import duration
from recoup.validate.tries import Kind, Try

_NAMED = 3  # modules, in a sentence


class _OutOfTimeError(Exception):
    """The rest of a search, or the training after it, cannot end within the budget."""


class Retuning:
    """The trainings after the recipe's own; between two of them the model is as the best rung made it.

    Args:
        climb: with every rung of the recipe measured.
        plain: the model's float self, with the same Parameters.
        plan: that the model is prepared with.
    """

    def __init__(self, climb: Climb, plain: nn.Module, plan: Plan) -> None:
        self.climb, self.plain, self.plan = climb, plain, plan
        self.recipe, self.run, self.say = climb.recipe, climb.run, climb.say
        self.standing, self.settings = climb.run.standing, climb.recipe.train

    def to_the_end(self) -> Plan:
        """Try until the gates pass, or nothing is left that can end in time; the plan of the best rung.

        Raises:
            OSError: the folder of the run cannot be written; what was saved before is kept.
        """
        while self.best.outcome != "passed" and (asked := self._next()) is not None:
            self._try(asked)
        self.standing.advice = [] if self.best.outcome == "passed" else self._advice()
        for line in self.standing.advice:
            self.say(f"worth more time: {line}")
        self.standing.retuned = True
        self.run.save()
        return self.plan

    @property
    def best(self) -> Rung:
        """The best rung so far."""
        assert self.standing.best is not None
        return self.standing.best

    @property
    def left(self) -> float:
        """Seconds of the budget after the last try; what is lost when one is stopped is part of it."""
        assert self.settings.budget is not None
        return self.settings.budget - spent(self.standing.tries)

    def _in_time(self, steps: int) -> bool:
        return expected_seconds(self.standing.tries, steps) <= self.left

    def _next(self) -> Try | None:
        """The next whole training, if it can end within the budget."""
        asked = self._another_rate() or self._more_steps() or self._more_bits()
        return asked if asked is not None and self._in_time(asked.steps) else None

    def _asked(self, kind: Kind, why: str, rate: float, raised: dict[str, str], begun_from: str) -> Try:
        number = sum(one.kind != "search" for one in self.standing.tries) + 1
        return Try(
            kind=kind,
            name=f"qat {number}",
            why=why,
            learning_rate=rate,
            steps=self.settings.steps,
            begun_from=begun_from,
            raised=raised,
        )

    def _another_rate(self) -> Try | None:
        """What the search found, where that is not the recipe's rate; searches first."""
        if any(one.kind == "rate" for one in self.standing.tries):
            return None
        rate = self._searched()
        if rate is None or rate == self.settings.learning_rate:
            return None
        why = f"of the rates searched, {rate:g} had the lowest held-out loss"
        return self._asked("rate", why, rate, {}, "")

    def _more_steps(self) -> Try | None:
        """As many again, from where the best training ended, if that was not its end."""
        best = self._best_try()
        if not best.falls or any(
            one.kind == "steps" and one.begun_from == best.name for one in self.standing.tries
        ):
            return None
        why = f"the held-out loss of {best.name} still fell at its last step"
        return self._asked("steps", why, best.learning_rate, best.raised, best.name)

    def _more_bits(self) -> Try | None:
        """For the few modules with most of the error; those of the tries before keep theirs."""
        tries, errors = self.standing.tries, self.standing.errors
        raised = next((one.raised for one in reversed(tries) if one.raised), {})
        measured = next((one.name for one in reversed(tries) if one.raised and one.name in errors), None)
        found = errors[measured or self.best.name]
        further = raised_further(self.plain, self.recipe, raised, found)
        new = {name: scheme for name, scheme in further.items() if raised.get(name) != scheme}
        if not new:
            return None
        share = sum(shares_of_error(found).get(name, 0.0) for name in new)
        now = raised_plan(self.plain, self.recipe, raised)
        named = [f"{name} ({now.modules[name]} -> {scheme})" for name, scheme in new.items()]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        why = f"{', '.join(named[:_NAMED])}{more}: {100 * share:.0f} % of the modules' squared error"
        return self._asked("bits", why, self._best_try().learning_rate, further, self.best.name)

    def _best_try(self) -> Try:
        """Of the best rung; the recipe's, without a fall, where that only calibrated."""
        tries = [one for one in self.standing.tries if one.kind != "search"]
        found = next((one for one in tries if one.name == self.best.name), None)
        return found or replace(min(tries, key=lambda one: one.held_out), raised={}, falls=False)

    def _searched(self) -> float | None:
        """What the search finds; None where it, or the training after it, does not end in time."""
        tries, steps = self.standing.tries, self.settings.steps
        if not searched(tries) and not self._in_time(round((SEARCH + 1) * steps)):
            return None

        def measure(rate: float, share: int) -> float:
            known = searched(tries)
            if (rate, share) not in known and not self._in_time(share + steps):
                raise _OutOfTimeError
            return known[rate, share] if (rate, share) in known else self._search(rate, share).held_out

        try:
            return successive_halving(rates(self.settings), round(SEARCH * steps), measure)
        except _OutOfTimeError:
            return None

    def _search(self, rate: float, steps: int) -> Try:
        """One training of the search, which no gate is asked of."""
        asked = Try(
            kind="search",
            name=f"rate {rate:g}, {steps} steps",
            why="search of a learning rate",
            learning_rate=rate,
            steps=steps,
        )
        curve: list[dict[str, float]] = []
        torch.manual_seed(self.recipe.seed)
        self.climb.to_the_untrained()
        log = logging.getLogger("recoup")
        level = log.level
        log.setLevel(logging.ERROR)  # a remedy for a rate that is only tried would mislead
        try:
            self._fit(asked, curve)
            made = replace(asked, held_out=lowest(curve))
        except NonFiniteLossError as error:
            made = replace(asked, error=str(error))
        finally:
            log.setLevel(level)
        self.climb.to_the_best()
        return self._end(made)

    def _try(self, asked: Try) -> None:
        """A whole training, of which the gates are asked."""
        self.say(f"re-tuning, {duration(max(self.left, 0))} left: {asked.why}")
        standing, curve = self.standing, list[dict[str, float]]()

        def change() -> None:
            if asked.kind == "rate":
                self.climb.to_the_untrained()
            else:
                self._to_the_best_with(asked.raised)
            self._fit(asked, curve)

        try:
            rung = self.climb.measured(asked.name, change)
        except NonFiniteLossError as error:
            self.say(f"  {error}")
            made = replace(asked, outcome="failed", error=str(error))
        else:
            made = replace(asked, held_out=lowest(curve), falls=falls(curve), outcome=rung.outcome)
            if self.best is rung:
                standing.curve = curve
                standing.symptoms = getattr(self.climb.model, "recoup_symptoms", [])
        self._end(replace(made, steps=int(curve[-1]["step"]) if curve else 0))

    def _end(self, made: Try) -> Try:
        """End the step of a try: the model is as the best rung made it, and the disk knows of it."""
        made = replace(made, seconds=self.run.seconds_of_step)
        self.standing.tries.append(made)
        told = asdict(made)
        self.run.record("try", took=told.pop("seconds"), **told)
        if made.name == self.best.name:
            self.climb.take()
        else:
            self._prepared_with(self.standing.raised)
            self.climb.to_the_best()
        self.run.save()
        shutil.rmtree(self.run.training, ignore_errors=True)
        return made

    def _fit(self, asked: Try, curve: list[dict[str, float]]) -> None:
        rate = at_rate(self.settings, asked.learning_rate)
        settings = {
            "search": shortened(rate, asked.steps),
            "rate": rate,
            "steps": going_on(rate, ranges=False),
            "bits": going_on(rate, ranges=True),
        }[asked.kind]
        # a folder of its own, since one that was finished may not be removed yet
        folder = self.run.training / asked.name.replace(" ", "-")
        self.climb.fit(settings, folder, curve, rung=asked.name)

    def _prepared_with(self, raised: dict[str, str]) -> list[str]:
        """The modules that are not what they were."""
        after = raised_plan(self.plain, self.recipe, raised)
        changed = give(self.climb.model, self.plain, self.plan, after)
        self.plan = after
        return changed

    def _to_the_best_with(self, raised: dict[str, str]) -> None:
        """What the best rung trained, and fresh ranges where modules are raised now."""
        model, changed = self.climb.model, self._prepared_with(raised)
        fresh = {
            name
            for name, module in model.named_modules()
            if isinstance(module, FakeQuantizer) and any(name.startswith(f"{path}.") for path in changed)
        }
        kept = {key: value for key, value in self.run.state.items() if key.rpartition(".")[0] not in fresh}
        model.load_state_dict(kept, strict=False)
        if changed:
            samples = self.recipe.calibration.samples
            calibrate(model, self.climb.calibration, observer="mse", samples=samples)
            model.load_state_dict(kept, strict=False)  # whose ranges are trained
            self.climb.settle(model)

    def _advice(self) -> list[str]:
        """Which of the three would be worth more time, and why."""
        tries, tried, lines = self.standing.tries, rates(self.settings), list[str]()
        rate = found_rate(tries, self.settings)
        if rate is None:
            whole = expected_seconds(tries, round((SEARCH + 1) * self.settings.steps))
            lines.append(
                f"the learning rate: a search, and a training with what it finds, take about "
                f"{duration(whole)}, and {duration(max(self.left, 0))} of the budget are left"
            )
        elif rate in (tried[0], tried[-1]):
            edge = "lowest" if rate == tried[0] else "highest"
            lines.append(
                f"the learning rate: the best, {rate:g}, was the {edge} of those tried; set "
                "train.learning_rate to it, and the search goes beyond"
            )
        for word, asked in (("more steps", self._more_steps()), ("more bits", self._more_bits())):
            lines += [f"{word}: {asked.why}"] if asked is not None else []
        return lines or [
            "none of the three: the best rate was tried, the held-out loss had stopped falling, and "
            f"{self.recipe.export.target} holds no module with more bits"
        ]
