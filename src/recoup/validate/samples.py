"""Per-sample values of metrics on fixed inputs: what makes an uncertainty possible at all.

A metric's aggregate is a function of the mean of its per-sample values: the mean itself for accuracy
or a score, exp of it for perplexity. `AGGREGATES` is the one place that knows which.

What is not a number (a model that diverged) is kept as it is: `gates.py` fails it, instead of the
measurement ending the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]

AGGREGATES: dict[str, Callable[[Values], Values]] = {
    "perplexity": np.exp,  # per sample: the mean negative log-likelihood of its tokens, in nats
}


def aggregate_of(metric: str, means: ArrayLike) -> Values:
    """The aggregate that each mean of per-sample values stands for; infinity where it overflows.

    >>> aggregate_of("accuracy", 0.5), aggregate_of("perplexity", 0.0)
    (array(0.5), array(1.))
    """
    means = np.asarray(means, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(AGGREGATES[metric](means) if metric in AGGREGATES else means)


def label_of(metric: str, slice: str | None) -> str:  # noqa: A002
    """How a metric on a slice is written: "accuracy[rare-topics]"."""
    return metric if slice is None else f"{metric}[{slice}]"


@dataclass(frozen=True, eq=False)
class Samples:
    """What a model scored on fixed inputs, input by input.

    Args:
        values: metric -> one value per sample, in the same order for every model that is compared. The
            per-sample values of "perplexity" are mean negative log-likelihoods in nats. A plain float
            is an aggregate without samples, of which no interval can be made; "accuracy[rare]" is then
            the aggregate on the slice "rare".
        slices: name -> boolean mask over the samples. A mask applies to every metric that has samples.

    Raises:
        ValueError: values that are not 1-D or empty, a mask that is not boolean, selects nothing or has
            another length than a metric.

    >>> samples = Samples({"accuracy": [1, 1, 0, 1]}, slices={"rare-topics": [False, False, True, True]})
    >>> samples.aggregate("accuracy"), samples.aggregate("accuracy", slice="rare-topics")
    (0.75, 0.5)
    """

    values: Mapping[str, ArrayLike]
    slices: Mapping[str, ArrayLike] = field(default_factory=dict[str, ArrayLike])

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Samples: no metric given; pass at least one, as in {'accuracy': [1, 0, 1]}")
        object.__setattr__(self, "values", {name: _values(name, v) for name, v in self.values.items()})
        object.__setattr__(self, "slices", {name: self._mask(name, m) for name, m in self.slices.items()})

    @classmethod
    def of(cls, result: "Samples | Mapping[str, ArrayLike]") -> "Samples":
        """What a user's `evaluate` returned, as Samples.

        Raises:
            ValueError: neither Samples nor a mapping from metrics to numbers.

        >>> Samples.of({"accuracy": 0.968}).aggregate("accuracy")
        0.968
        """
        found: Any = result  # it comes from a user's function, whatever its annotation says
        if isinstance(found, Samples):
            return found
        if isinstance(found, Mapping):
            return cls(found)
        raise ValueError(
            f"evaluate returned {type(found).__name__}; return recoup.Samples or a mapping, "
            "as in {'accuracy': [1, 0, 1]}"
        )

    def per_sample(self, metric: str, slice: str | None = None) -> Values | None:  # noqa: A002
        """The values of a metric, those of a slice only if one is named; None for a plain float.

        Raises:
            ValueError: no such metric or slice; the message names those that there are.
        """
        label = label_of(metric, slice)
        if label in self.values and np.ndim(self.values[label]) == 0:
            return None
        if metric not in self.values:
            raise ValueError(f"metric {metric!r} asked; measured were {_names(self.values)}")
        if slice is None:
            return np.asarray(self.values[metric])
        if np.ndim(self.values[metric]) == 0:
            raise ValueError(
                f"{label} asked, but {metric!r} is a plain float; return per-sample values, or also {label!r}"
            )
        if slice not in self.slices:
            raise ValueError(f"slice {slice!r} of {metric!r} asked; there are {_names(self.slices)}")
        return np.asarray(self.values[metric])[np.asarray(self.slices[slice])]

    def aggregate(self, metric: str, slice: str | None = None) -> float:  # noqa: A002
        """The metric over all samples, or over those of a slice, in the units of the metric.

        Raises:
            ValueError: no such metric or slice.

        >>> round(Samples({"perplexity": [2.0, 2.6]}).aggregate("perplexity"), 2)
        9.97
        """
        values = self.per_sample(metric, slice)
        if values is None:
            return float(np.asarray(self.values[label_of(metric, slice)]))
        return float(aggregate_of(metric, values.mean()))

    def summary(self) -> dict[str, float]:
        """Every aggregate, as plain JSON; `Samples.of` reads it back as plain floats.

        >>> Samples({"accuracy": [1, 0]}, slices={"tail": [False, True]}).summary()
        {'accuracy': 0.5, 'accuracy[tail]': 0.0}
        """
        whole = {metric: self.aggregate(metric) for metric in self.values}
        sliced = {
            label_of(metric, name): self.aggregate(metric, name)
            for metric, values in self.values.items()
            if np.ndim(values)
            for name in self.slices
        }
        return whole | sliced

    def _mask(self, name: str, mask: ArrayLike) -> NDArray[np.bool_]:
        found = np.array(mask)
        if found.dtype != np.bool_ or found.ndim != 1:
            raise ValueError(
                f"slice {name!r}: {found.dtype} of shape {found.shape} given; "
                "pass one True or False per sample"
            )
        lengths = {metric: len(np.asarray(v)) for metric, v in self.values.items() if np.ndim(v)}
        if not lengths:
            raise ValueError(f"slice {name!r}: no metric has samples to select from; pass per-sample values")
        for metric, length in lengths.items():
            if length != len(found):
                raise ValueError(
                    f"slice {name!r} masks {len(found)} samples, but {metric!r} has {length}; "
                    "pass one True or False per sample, and the same samples for every metric"
                )
        if not found.any():
            raise ValueError(f"slice {name!r} selects none of {len(found)} samples; leave it out")
        found.setflags(write=False)
        return found


def _values(metric: str, values: ArrayLike) -> Values:
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {metric!r}: not numbers ({error}); pass one number per sample") from None
    if found.ndim > 1:
        raise ValueError(f"metric {metric!r}: shape {found.shape} given; pass one number per sample")
    if found.size == 0:
        raise ValueError(f"metric {metric!r}: no samples given; pass at least one")
    found.setflags(write=False)
    return found


def _names(mapping: Mapping[str, object]) -> str:
    return ", ".join(map(repr, mapping)) or "none"
