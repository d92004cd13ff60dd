"""A limit against the baseline, and the verdict with its uncertainty.

The two models saw the same inputs, so they are compared input by input: sample indices are drawn once
for both (the paired percentile bootstrap, Efron & Tibshirani 1993, chapter 13), and what is hard for
both cancels. A gate passes when the whole 95 % interval of the change is within the limit, fails when
the whole interval is beyond it, and is undecided otherwise: then more samples are needed, not hope.

Three things a bootstrap cannot know, and what is done about each:

    an event that no sample showed      right-or-wrong metrics: 3 / n for each direction in which nothing
                                        changed (the rule of three, Hanley & Lippman-Hand 1983)
    how wide the tails are              below 6 samples not even [smallest, largest] covers a median with
                                        95 % (1 - 2^(1 - n)): undecided
    that samples depend on each other   neighbours are averaged into at most 2048 groups, which are drawn
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ValidationError

from recoup.schemes.limit import Limit
from recoup.validate.samples import AGGREGATES, Samples, Values, aggregate_of, label_of

Outcome = Literal["passed", "failed", "undecided"]
Result = Samples | Mapping[str, ArrayLike]

_RESAMPLES = 10_000
_GROUPS = 2048
_FEWEST = 6
_MOST = 100  # "more samples" is not said beyond this many times what there is


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate found.

    Args:
        gate: the gate in words.
        metric, slice: what was compared; slice is None for all samples.
        direction: the direction that is limited.
        baseline, candidate: aggregates, in the units of the metric.
        change: candidate - baseline.
        lo, hi: the 95 % interval of the change; None where there is none.
        limit: the largest change that is allowed in `direction`, a positive amount in the same units.
        relative: the limit was given as a share of the baseline, so changes are written in percent of it.
        samples: how many were compared; None for plain floats.
        outcome: "passed", "failed" or "undecided".
        more_samples: about how many further ones would decide; None where that is not the question.
        reason: why the outcome is what it is.
    """

    gate: str
    metric: str
    slice: str | None
    direction: Literal["increase", "decrease"]
    baseline: float
    candidate: float
    change: float
    lo: float | None
    hi: float | None
    limit: float
    relative: bool
    samples: int | None
    outcome: Outcome
    more_samples: int | None
    reason: str

    @property
    def passed(self) -> bool:
        """The whole interval is within the limit."""
        return self.outcome == "passed"

    def amount(self, change: float) -> str:
        """A change as this gate writes it: in percent of the baseline, or in the metric's units."""
        return f"{100 * change / abs(self.baseline):+.2g} %" if self.relative else f"{change:+.3g}"

    @property
    def allowed(self) -> str:
        """The limit with its sign, as in "-2 %"."""
        return self.amount(self.limit if self.direction == "increase" else -self.limit)

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what is not a number."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        interval = (
            "no interval"
            if self.lo is None or self.hi is None
            else f"95 % interval {self.amount(self.lo)} .. {self.amount(self.hi)}"
        )
        return (
            f"{label_of(self.metric, self.slice)} {self.baseline:.4g} -> {self.candidate:.4g} "
            f"({self.amount(self.change)}, {interval}), at most {self.allowed} allowed: {self.outcome}"
            + ("" if self.passed else f" ({self.reason})")
        )


def outcome_of(verdicts: Iterable[Verdict]) -> Outcome:
    """One failed verdict fails them all, one undecided leaves them undecided; none proves nothing.

    >>> outcome_of([])
    'undecided'
    """
    outcomes = {verdict.outcome for verdict in verdicts}
    if "failed" in outcomes:
        return "failed"
    return "passed" if outcomes == {"passed"} else "undecided"


@dataclass(frozen=True)
class Gate:
    """How far a metric may move away from the baseline.

    Args:
        metric: its name in the Samples.
        max_increase, max_decrease: "2%" of the baseline or {"absolute": 0.5}; exactly one of the two.
        slice: judge the samples of this slice only.
        interval: "none" compares the aggregates as they are, without an uncertainty.

    Raises:
        ValueError: both limits or neither, or one that is no limit.

    >>> baseline = {"accuracy": [1, 1, 1, 0] * 250}
    >>> gate = Gate("accuracy", max_decrease="2%")
    >>> print(gate.check(baseline, {"accuracy": [1, 1, 1, 0] * 250}))
    accuracy 0.75 -> 0.75 (+0 %, 95 % interval -0.4 % .. +0.4 %), at most -2 % allowed: passed
    """

    metric: str
    max_increase: Limit | str | Mapping[str, float] | None = field(default=None, kw_only=True)
    max_decrease: Limit | str | Mapping[str, float] | None = field(default=None, kw_only=True)
    slice: str | None = field(default=None, kw_only=True)
    interval: Literal["bootstrap", "none"] = field(default="bootstrap", kw_only=True)

    def __post_init__(self) -> None:
        if (self.max_increase is None) == (self.max_decrease is None):
            raise ValueError(
                f"Gate {self.metric!r}: {'neither' if self.max_increase is None else 'both'} of max_increase "
                "and max_decrease given; give the one in which the metric gets worse"
            )
        if self.interval not in ("bootstrap", "none"):
            raise ValueError(
                f'Gate {self.metric!r}: interval {self.interval!r} asked; there are "bootstrap" and "none"'
            )
        try:
            limit = self.limit
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"Gate {self.metric!r}: {reason}") from None
        object.__setattr__(self, f"max_{self.direction}", limit)

    @property
    def direction(self) -> Literal["increase", "decrease"]:
        """The direction in which the metric gets worse."""
        return "decrease" if self.max_increase is None else "increase"

    @property
    def limit(self) -> Limit:
        """How far it may move in that direction."""
        return Limit.model_validate(self.max_decrease if self.max_increase is None else self.max_increase)

    def __str__(self) -> str:
        return f"{label_of(self.metric, self.slice)}: {self.direction} of at most {self.limit}"

    def check(self, baseline: Result, candidate: Result) -> Verdict:
        """Compare a candidate with the baseline, on the same samples in the same order.

        `check(baseline, baseline)` before any work says whether the gate can be asked of these samples.

        Raises:
            ValueError: the metric or slice is missing, the samples are not the same ones, the baseline
                is not finite, or the limit is a share of a baseline of 0.
        """
        before, after = Samples.of(baseline), Samples.of(candidate)
        pair = self._paired(before, after)
        old, new = before.aggregate(self.metric, self.slice), after.aggregate(self.metric, self.slice)
        label = label_of(self.metric, self.slice)
        if not math.isfinite(old):
            raise ValueError(f"{label} of the baseline is {old}; measure a baseline that works first")
        relative = self.limit.relative is not None
        if relative and old == 0:
            raise ValueError(
                f"{label}: {self.limit} of a baseline of 0 is nothing; limit it by {{absolute: ...}} instead"
            )
        lo, hi, unseen = None, None, (0.0, 0.0)
        if pair is not None and math.isfinite(new) and self.interval == "bootstrap":
            lo, hi, unseen = _interval(self.metric, pair)
        limit = self.limit.allowed(old)
        outcome, more, reason = self._judge(new, new - old, lo, hi, limit, unseen, pair)
        return Verdict(
            gate=str(self),
            metric=self.metric,
            slice=self.slice,
            direction=self.direction,
            baseline=old,
            candidate=new,
            change=new - old,
            lo=lo,
            hi=hi,
            limit=limit,
            relative=relative,
            samples=None if pair is None else len(pair),
            outcome=outcome,
            more_samples=more,
            reason=reason,
        )

    def _paired(self, before: Samples, after: Samples) -> Values | None:
        """(samples, 2): the baseline's values beside the candidate's; None without samples."""
        old, new = (samples.per_sample(self.metric, self.slice) for samples in (before, after))
        if old is None or new is None:
            return None
        if self.slice is not None and not np.array_equal(before.slices[self.slice], after.slices[self.slice]):
            raise ValueError(
                f"slice {self.slice!r} selects other samples for the candidate than for the baseline; "
                "use one mask for both"
            )
        if len(old) != len(new):
            raise ValueError(
                f"metric {self.metric!r}: {len(old)} samples for the baseline, {len(new)} for the candidate; "
                "measure both on the same inputs"
            )
        return np.stack([old, new], axis=1)

    def _judge(
        self,
        candidate: float,
        change: float,
        lo: float | None,
        hi: float | None,
        limit: float,
        unseen: tuple[float, float],
        pair: Values | None,
    ) -> tuple[Outcome, int | None, str]:
        if not math.isfinite(candidate):
            return "failed", None, f"the candidate's {self.metric} is {candidate}"
        worse = change if self.direction == "increase" else -change
        if self.interval == "none":
            outcome: Outcome = "passed" if worse <= limit else "failed"
            return outcome, None, "compared without an interval, as the gate asks"
        if pair is None:
            return "undecided", None, 'no samples: return per-sample values, or set interval: "none"'
        assert lo is not None
        assert hi is not None
        best, worst = (lo, hi) if self.direction == "increase" else (-hi, -lo)
        if len(pair) < _FEWEST:
            return "undecided", _FEWEST - len(pair), f"{len(pair)} samples; an interval needs {_FEWEST}"
        if worst <= limit:
            return "passed", None, "the whole interval is within the limit"
        if best > limit:
            return "failed", None, "the whole interval is beyond the limit"
        # The side of the interval that has to come in, to pass or to fail.
        passing = worse <= limit
        rare = unseen[1 if passing == (self.direction == "increase") else 0]
        more = _more_samples(len(pair), worst - worse if passing else worse - best, rare, abs(limit - worse))
        if more is None:
            return (
                "undecided",
                (_MOST - 1) * len(pair),
                f"the change sits at the limit: more than {_MOST} times as many samples would be needed",
            )
        return "undecided", more, f"the interval spans the limit: about {more:,} more samples would decide"


def _interval(metric: str, pair: Values) -> tuple[float, float, tuple[float, float]]:
    """The 95 % interval of the change, and how much of each side stands for events not seen."""
    old, new = aggregate_of(metric, _resampled_means(pair)).T
    lo, hi = (float(bound) for bound in np.quantile(new - old, [0.025, 0.975]))
    if metric in AGGREGATES or not np.isin(pair, (0, 1)).all():
        return lo, hi, (0.0, 0.0)
    flips = pair[:, 1] - pair[:, 0]
    below, above = (0.0 if (flips == sign).any() else 3 / len(pair) for sign in (-1, 1))
    return max(lo - below, -1.0), min(hi + above, 1.0), (below, above)


def _resampled_means(pair: Values) -> Values:
    """(resamples, 2): the means of both columns over sample indices drawn once for both."""
    groups = min(len(pair), _GROUPS)
    starts = np.arange(groups) * len(pair) // groups
    # The change, not the candidate: where nothing changed, its sums are 0 in any order of summation.
    columns = np.column_stack([pair[:, 0], pair[:, 1] - pair[:, 0], np.ones(len(pair))])
    sums = np.add.reduceat(columns, starts, axis=0)
    draw = np.random.default_rng(0)
    rows = max(1, 2**20 // groups)  # resamples at a time: 24 MB of them
    totals = np.concatenate(
        [_counts(draw, min(rows, _RESAMPLES - start), groups) @ sums for start in range(0, _RESAMPLES, rows)]
    )
    old, change = (totals[:, :2] / totals[:, 2:]).T
    return np.stack([old, old + change], axis=1)


def _counts(draw: np.random.Generator, resamples: int, groups: int) -> Values:
    """(resamples, groups): how often each group is in each resample."""
    drawn = draw.integers(groups, size=(resamples, groups), dtype=np.int32)
    places = drawn + groups * np.arange(resamples, dtype=np.int32)[:, None]
    counts = np.bincount(places.ravel(), minlength=resamples * groups)
    return counts.reshape(resamples, groups).astype(np.float64)


def _more_samples(samples: int, side: float, unseen: float, margin: float) -> int | None:
    """How many further ones bring one side of the interval down to the margin; None if very many.

    The unseen part of the side shrinks with 1 / n, the rest with 1 / sqrt(n). With r = sqrt(n / n'),
    unseen r^2 + (side - unseen) r = margin.

    >>> _more_samples(100, side=0.04, unseen=0.0, margin=0.02)
    300
    """
    seen = side - unseen
    ratio = 2 * margin / (seen + math.sqrt(seen**2 + 4 * unseen * margin))
    if ratio**2 * _MOST <= 1:
        return None
    return max(1, math.ceil(samples / ratio**2 - 1e-6) - samples)
