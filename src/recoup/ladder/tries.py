"""How re-tuning decides, as pure functions of what was tried."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from recoup.schemes import TrainSettings
from recoup.validate.tries import Try

Candidate = TypeVar("Candidate", bound=Hashable)

# From a thirtieth of the recipe's rate to a hundred of it: under fake quantization too low a rate is the
# commoner mistake, since an update below half a step between codes changes nothing.
RATES = tuple(10 ** (half / 2) for half in range(-3, 5))
SEARCH = 1.5  # of a training's steps, for all trainings of the search together
FALL = 0.02  # of the loss: what falls less has converged, as far as a few held-out batches tell
FEW = 0.1  # of the quantized modules: no more are raised at once
CAUSE = 0.5  # of the squared error: what modules that are raised have together


def successive_halving(
    candidates: Sequence[Candidate], budget: int, measure: Callable[[Candidate, int], float]
) -> Candidate:
    """The best candidate, found by giving the better half of them ever more of a budget.

    Every round has the same part of the budget, and divides it among the candidates that are left (Jamieson &
    Talwalkar 2016, arXiv:1502.07943). There a round goes on where the one before it ended; here each measures
    from the start, because a training of another length has another schedule.

    Args:
        candidates: the first of equals wins.
        budget: of all measurements together; each gets at least 1 of it.
        measure: (candidate, its share) -> a loss; not-a-number loses.

    >>> successive_halving([8, 3, 5, 4], 16, lambda candidate, share: abs(candidate - 4))
    4
    """
    left, rounds = list(candidates), len(candidates).bit_length() - 1
    for _ in range(rounds):
        share = max(1, budget // (len(left) * rounds))
        losses = {candidate: measure(candidate, share) for candidate in left}
        left = sorted(left, key=lambda one: math.inf if math.isnan(losses[one]) else losses[one])
        left = left[: len(left) // 2]
    return left[0]


def rates(settings: TrainSettings) -> list[float]:
    """Those of the search, in two digits but for the recipe's own."""
    given = settings.learning_rate
    return [given if share == 1 else float(f"{given * share:.2g}") for share in RATES]


def searched(tries: Sequence[Try]) -> dict[tuple[float, int], float]:
    """(rate, steps) -> the held-out loss, of every training of the search."""
    return {(one.learning_rate, one.steps): one.held_out for one in tries if one.kind == "search"}


def found_rate(tries: Sequence[Try], settings: TrainSettings) -> float | None:
    """What the search found; None while it is not over."""
    found = searched(tries)
    try:
        return successive_halving(
            rates(settings), round(SEARCH * settings.steps), lambda rate, steps: found[rate, steps]
        )
    except KeyError:
        return None


def at_rate(settings: TrainSettings, rate: float) -> TrainSettings:
    """The recipe's training at another rate; that of scales keeps its ratio to it."""
    scales = settings.scale_learning_rate
    ratio = None if scales is None else scales * (rate / settings.learning_rate)
    return settings.model_copy(update={"learning_rate": rate, "scale_learning_rate": ratio, "budget": None})


def shortened(settings: TrainSettings, steps: int) -> TrainSettings:
    """The same training with all of its schedule in fewer steps, and a look at the end."""

    def share(number: int) -> int:
        return number * steps // settings.steps

    frozen = None if settings.freeze_ranges is None else share(settings.freeze_ranges)
    norms = settings.batch_norm
    if norms is not None and norms.freeze is not None:
        norms = norms.model_copy(update={"freeze": share(norms.freeze)})
    return settings.model_copy(
        update={
            "steps": steps,
            "warmup": share(settings.warmup),
            "start_step": share(settings.start_step),
            "freeze_ranges": frozen,
            "batch_norm": norms,
            "evaluate_every": steps,
            "early_stop": None,
        }
    )


def going_on(settings: TrainSettings, *, ranges: bool) -> TrainSettings:
    """The same training from where one ended: with the bits by then, and frozen ranges but for fresh ones."""
    frozen = settings.freeze_ranges if ranges or settings.freeze_ranges is None else 0
    norms = settings.batch_norm
    if norms is not None and norms.freeze is not None:
        norms = norms.model_copy(update={"freeze": 0})
    fresh = {"start_step": 0, "progressive": (), "freeze_ranges": frozen, "batch_norm": norms}
    return settings.model_copy(update=fresh)


def lowest(curve: Sequence[Mapping[str, float]]) -> float:
    """The lowest held-out loss after the start; infinite where there is none."""
    looks = (entry["held_out"] for entry in curve if entry["step"] and "held_out" in entry)
    return min((loss for loss in looks if not math.isnan(loss)), default=math.inf)


def falls(curve: Sequence[Mapping[str, float]]) -> bool:
    """Was the held-out loss still falling at the last step?

    It was lowest there, and by `FALL` lower than at any look up to the middle. Between these, since the rate
    falls to 0, the last looks are always near each other.
    """
    looks = [(entry["step"], entry["held_out"]) for entry in curve if "held_out" in entry]
    if len(looks) < 2:
        return False
    last, loss = looks[-1]
    early = [value for step, value in looks[:-1] if 2 * step <= last]
    return loss <= min(value for _, value in looks) and loss < (1 - FALL) * min(early)


def spent(tries: Sequence[Try]) -> float:
    """Seconds of the budget that finished tries took; the recipe's own training is none of it."""
    return sum(one.seconds for one in tries if one.kind != "recipe")


def expected_seconds(tries: Sequence[Try], steps: int) -> float:
    """What a training of so many steps takes, by the time of a step of the newest of about that length."""
    nearest = min(reversed(tries), key=lambda one: abs(one.steps - steps))
    return steps * nearest.seconds / max(1, nearest.steps)


def shares_of_error(errors: Mapping[str, float]) -> dict[str, float]:
    """Module -> its share of the squared errors, the largest first.

    Squared, because errors of independent roundings add up so.
    """
    squares = {name: error**2 for name, error in errors.items() if math.isfinite(error)}
    whole = sum(squares.values()) or 1.0
    return {name: squares[name] / whole for name in sorted(squares, key=lambda name: -squares[name])}
