"""Observers: what a tensor's values look like. They live inside `calibrate()` and leave no trace.

An observer watches 2-D views of one tensor and then answers with the range, per block, that its spec
should represent. A wide range rounds coarsely, a narrow one clips: `minmax` and `moving-average` take what
they saw, `percentile`, `kl` and `mse` give up the tails for finer steps, each by a rule of its own.
docs/calibration.md says when to take which.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recoup.numerics import (
    QuantSpec,
    choose_global_scale,
    choose_qparams,
    extrema,
    fake_quantize,
    per_channel,
    per_tensor,
)
from recoup.numerics.granularity import cut

_MOMENTUM = 0.9
_PERCENTILE = 0.9999
_BINS = 2048  # for each sign
_BINS_PER_STEP = 8
_EMPTY = 1e-4
_SHRINK = torch.linspace(1.0, 0.35, 27)  # the widest range first, so that it wins ties
_CACHED_VALUES = 2**16
_KEPT_VALUES = 2**18  # of one tensor, for the rules that clip: 1 MiB


class Observer(Protocol):
    """Watches one tensor."""

    def observe(self, view: Float[Tensor, "r c"]) -> None:
        """See one more batch of it."""
        ...

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest and largest value to represent, per block, and the largest |x| of all.

        Raises:
            ValueError: nothing was observed.
        """
        ...


class MinMax:
    """The extrema over everything seen.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(8), granularity=per_tensor, scale_rule="narrow", ranges="static")
    >>> observer = MinMax(spec)
    >>> observer.observe(torch.tensor([[1.0, -3.0]])); observer.observe(torch.tensor([[2.0, 0.0]]))
    >>> [float(bound) for bound in observer.range()]
    [-3.0, 2.0, 3.0]
    """

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.seen: tuple[Tensor, Tensor] | None = None

    def observe(self, view: Float[Tensor, "r c"]) -> None:
        """See one more batch."""
        lo, hi = extrema(view, self.spec.granularity)
        self.seen = (lo, hi) if self.seen is None else self.joined(*self.seen, lo, hi)

    def joined(self, lo: Tensor, hi: Tensor, batch_lo: Tensor, batch_hi: Tensor) -> tuple[Tensor, Tensor]:
        """The extrema so far and those of a batch, as one."""
        return torch.minimum(lo, batch_lo), torch.maximum(hi, batch_hi)

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        """The extrema."""
        if self.seen is None:
            raise ValueError("saw no values: no batch reaches it")
        lo, hi = self.seen
        return lo, hi, torch.maximum(-lo, hi).amax()


class MovingAverage(MinMax):
    """The extrema of every batch, averaged: a batch counts 0.1, all that came before it 0.9.

    So no single batch decides, and the last ones count most (Jacob et al. 2018, section 3.1). Of one batch,
    as of a weight, it is `MinMax`.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(8), granularity=per_tensor, scale_rule="narrow", ranges="static")
    >>> observer = MovingAverage(spec)
    >>> observer.observe(torch.tensor([[1.0, -3.0]])); observer.observe(torch.tensor([[21.0, -3.0]]))
    >>> [round(float(bound), 4) for bound in observer.range()]
    [-3.0, 3.0, 3.0]
    """

    def joined(self, lo: Tensor, hi: Tensor, batch_lo: Tensor, batch_hi: Tensor) -> tuple[Tensor, Tensor]:
        """The average."""
        return torch.lerp(batch_lo, lo, _MOMENTUM), torch.lerp(batch_hi, hi, _MOMENTUM)


class Sampled(ABC):
    """The extrema of everything seen, and rows of it to judge them by; `clipped` says how.

    A weight whose rows have scales of their own is kept whole. Of other tensors, once they pass 2^18 values,
    every row is kept with probability 1/2, 1/4, ...: rows from all that was seen, in step with no period of
    channels or positions, and the same ones however they come in batches.
    """

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.extrema = MinMax(spec)
        self.kept: list[tuple[Tensor, Tensor]] = []  # rows, and a number in [0, 1) for each of them
        self.share = 1.0  # the rows whose number is below are kept
        self.random = torch.Generator().manual_seed(0)

    def observe(self, view: Float[Tensor, "r c"]) -> None:
        """See one more batch."""
        self.extrema.observe(view)
        numbers = torch.rand(len(view), generator=self.random, dtype=torch.float64)
        if not self.kept:
            numbers[:1] = 0  # one row stays whatever happens
        while self.spec.granularity.rows is None and self._is_too_much(view, numbers):
            self.share /= 2
            self.kept = [self._below(*batch) for batch in self.kept]
        self.kept.append(self._below(view.detach(), numbers))

    def _below(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        below = numbers < self.share
        return rows[below.to(rows.device)].float(), numbers[below]

    def _is_too_much(self, view: Tensor, numbers: Tensor) -> bool:
        added = int((numbers < self.share).sum())
        values = added * view.shape[1] + sum(rows.numel() for rows, _ in self.kept)
        return values > _KEPT_VALUES and added + sum(len(rows) for rows, _ in self.kept) > 1

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        """The extrema, clipped."""
        lo, hi, amax = self.extrema.range()
        if amax.isfinite():  # else the range is refused as it is
            rows = [rows for rows, _ in self.kept]
            if self.spec.granularity == per_tensor:  # images of several sizes have rows of several lengths
                rows = [torch.cat([row.flatten() for row in rows])[None]]
            lo, hi = self.clipped(torch.cat(rows), lo, hi, amax)
        return lo, hi, amax

    @abstractmethod
    def clipped(self, x: Tensor, lo: Tensor, hi: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
        """The range to represent, where x is a sample of what lies in [lo, hi]."""


class Percentile(Sampled):
    """The extrema, but no further from zero than 99.99 % of the values of the block are.

    One threshold for both signs (Wu et al. 2020, arXiv:2004.09602, on calibration); between two values of the
    sample it is interpolated. Blocks of a few values keep nearly all of them.
    """

    def clipped(self, x: Tensor, lo: Tensor, hi: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
        """At the percentile of each block."""
        del amax
        magnitudes = cut(x.abs(), self.spec.granularity).transpose(1, 2).flatten(2)
        place = _PERCENTILE * (magnitudes.shape[2] - 1)
        largest = magnitudes.topk(magnitudes.shape[2] - int(place), dim=2).values
        threshold = torch.lerp(largest[..., -1], largest[..., max(len(largest[0, 0]) - 2, 0)], place % 1)
        return torch.maximum(lo, -threshold), torch.minimum(hi, threshold)


class KL(Sampled):
    """The extrema, but no further from zero than the threshold at which least information is lost.

    TensorRT's entropy calibration (Migacz, "8-bit inference with TensorRT", GTC 2017): of a histogram with
    2048 bins for each sign, P is what lies within a threshold, with the tails on its outermost bins; Q is
    the same without the tails, as the codes tell it: all bins of one code share their counts evenly. The
    threshold with the least KL(P || Q) wins. Unlike there, the codes are those of the spec, so that every
    format and zero points count as they are; zeros, which are exact at any threshold, are left out; every
    8th threshold is tried; and a bin that Q alone leaves empty has 1e-4 of a count, as in MXNet.

    As there, only a tensor with one scale is judged so. Blocks with scales of their own, as those of most
    weights, hold too few values for a histogram and keep their extrema.
    """

    def clipped(self, x: Tensor, lo: Tensor, hi: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
        """At the threshold of the tensor."""
        if self.spec.granularity != per_tensor or amax == 0:
            return lo, hi
        width = amax / _BINS
        counts = torch.histc(x[x != 0], 2 * _BINS, -float(amax), float(amax)).double()
        places = (torch.arange(2 * _BINS, device=x.device) + 0.5 - _BINS) * width
        # A row for every threshold, the widest first, so that it wins ties.
        bins = torch.arange(_BINS, 2 ** (self.spec.format.bits - 1) - 1, -_BINS_PER_STEP, device=x.device)
        threshold = bins[:, None] * width
        spec = replace(self.spec, granularity=per_channel, ranges="static")
        qparams = choose_qparams(
            torch.maximum(lo, -threshold),
            torch.minimum(hi, threshold),
            spec,
            choose_global_scale(amax, spec),
        )
        values = fake_quantize(places.expand(len(bins), -1), qparams, spec)
        within = counts * (places.abs() < threshold)
        best = threshold[_divergence(_with_tails(counts, within, bins), within, values).argmin()]
        return torch.maximum(lo, -best), torch.minimum(hi, best)


def _with_tails(counts: Tensor, within: Tensor, bins: Tensor) -> Tensor:
    """The rows of `within`, and on the outermost bins of each what the row leaves out."""
    first, last = (_BINS - bins)[:, None], (_BINS + bins - 1)[:, None]
    below, above = counts.cumsum(0) - counts, counts.sum() - counts.cumsum(0)
    return within.scatter_add(1, first, below[first]).scatter_add(1, last, above[last])


def _divergence(p: Tensor, within: Tensor, values: Tensor) -> Tensor:
    """KL(P || Q) of every row; Q spreads what is within evenly over the bins of one value that P fills."""
    codes = F.pad(values.diff(dim=1).ne(0).cumsum(1), (1, 0))
    filled = (p > 0).double()
    zeros = torch.zeros_like(p)
    share = zeros.scatter_add(1, codes, within) / zeros.scatter_add(1, codes, filled).clamp(min=1)
    q = share.gather(1, codes).clamp(min=_EMPTY) * filled
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(dim=1)


class MSE(Sampled):
    """The share of the extrema, between 0.35 and 1, whose quantization error is smallest in the square.

    Each block chooses for itself.
    """

    def clipped(self, x: Tensor, lo: Tensor, hi: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
        """The extrema, shrunk."""
        spec = replace(self.spec, ranges="static")
        global_scale = choose_global_scale(amax, spec)
        # Blocks do not know of each other, so the search goes through them in pieces that fit a cache.
        pieces = max(1, min(len(lo), x.numel() // _CACHED_VALUES))
        by_block_row = x.reshape(len(lo), -1, x.shape[1])
        shares = [
            best_share(rows.flatten(0, 1), least, most, spec, global_scale)
            for rows, least, most in zip(
                *(tensor.tensor_split(pieces) for tensor in (by_block_row, lo, hi)), strict=True
            )
        ]
        share = torch.cat(shares)
        return share * lo, share * hi


def best_share(
    x: Tensor,
    lo: Tensor,
    hi: Tensor,
    spec: QuantSpec,
    global_scale: Tensor | None,
    importance: Tensor | None = None,
) -> Tensor:
    """The share of the extrema of every block with the least squared error, weighted by column."""
    best, share = torch.full_like(lo, torch.inf), torch.ones_like(lo)
    for shrink in _SHRINK.to(x.device):
        qparams = choose_qparams(shrink * lo, shrink * hi, spec, global_scale)
        squared = (fake_quantize(x, qparams, spec) - x).square()
        weighted = squared if importance is None else squared * importance
        error = cut(weighted, spec.granularity).sum(dim=(1, 3))
        share = torch.where(error < best, shrink, share)
        best = torch.minimum(best, error)
    return share


OBSERVERS: dict[str, Callable[[QuantSpec], Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "kl": KL,
    "mse": MSE,
}
