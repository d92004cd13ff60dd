"""Observers: what a tensor's values look like. They live inside `calibrate()` and leave no trace.

An observer watches 2-D views of one tensor and then answers with the range, per block, that its spec
should represent. The file teaches two: the extrema, and the range of least squared error.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from recoup.numerics import QuantSpec, choose_global_scale, choose_qparams, extrema, fake_quantize
from recoup.numerics.granularity import cut

_SHRINK = torch.linspace(1.0, 0.35, 27)  # the widest range first, so that it wins ties
_CACHED_VALUES = 2**16
_KEPT_VALUES = 2**18  # of one tensor, for the search: 1 MiB


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
        if self.seen is not None:
            lo, hi = torch.minimum(self.seen[0], lo), torch.maximum(self.seen[1], hi)
        self.seen = lo, hi

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        """The extrema."""
        if self.seen is None:
            raise ValueError("saw no values: no batch reaches it")
        lo, hi = self.seen
        return lo, hi, torch.maximum(-lo, hi).amax()


class MSE:
    """The share of the extrema, between 0.35 and 1, whose quantization error is smallest in the square.

    Each block chooses for itself. A tensor of more than 2^18 values is judged on every 2nd, 4th, ... row,
    evenly over all that was seen.
    """

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.extrema = MinMax(spec)
        self.rows: list[Tensor] = []
        self.stride = 1

    def observe(self, view: Float[Tensor, "r c"]) -> None:
        """See one more batch."""
        self.extrema.observe(view)
        thin = self.spec.granularity.rows is None  # else every row has scales of its own, and is needed
        self.rows.append(view[:: self.stride].detach().float())
        while thin and sum(rows.numel() for rows in self.rows) > _KEPT_VALUES and len(view) > self.stride:
            self.rows = [torch.cat(self.rows)[::2]]
            self.stride *= 2

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        """The extrema, shrunk."""
        lo, hi, amax = self.extrema.range()
        x = torch.cat(self.rows)
        spec = replace(self.spec, ranges="static")
        global_scale = choose_global_scale(amax, spec)
        # Blocks do not know of each other, so the search goes through them in pieces that fit a cache.
        pieces = max(1, min(len(lo), x.numel() // _CACHED_VALUES))
        by_block_row = x.reshape(len(lo), -1, x.shape[1])
        shares = [
            _best_share(rows.flatten(0, 1), least, most, spec, global_scale)
            for rows, least, most in zip(
                *(tensor.tensor_split(pieces) for tensor in (by_block_row, lo, hi)), strict=True
            )
        ]
        share = torch.cat(shares)
        return share * lo, share * hi, amax


def _best_share(x: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec, global_scale: Tensor | None) -> Tensor:
    best, share = torch.full_like(lo, torch.inf), torch.ones_like(lo)
    for shrink in _SHRINK.to(x.device):
        qparams = choose_qparams(shrink * lo, shrink * hi, spec, global_scale)
        error = cut((fake_quantize(x, qparams, spec) - x).square(), spec.granularity).sum(dim=(1, 3))
        share = torch.where(error < best, shrink, share)
        best = torch.minimum(best, error)
    return share


OBSERVERS: dict[str, Callable[[QuantSpec], Observer]] = {"minmax": MinMax, "mse": MSE}
