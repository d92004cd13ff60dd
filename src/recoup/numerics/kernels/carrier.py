"""The byte in which a value of a format is kept, so that few and simple operations get it back.

The bit pattern of a float format takes shifts and a table to decode. But the values of every integer, FP4
and some FP6 formats are small multiples of one number, so a signed byte holds the multiple: an int8 to
float32 copy and one multiplication restore it. Such a byte has room beyond the format's ends too, and a
value that saturated is kept there: the codes imply where the straight-through gradient is 0. Formats that
fill all 256 bytes, or whose values are no such multiples, are kept without that mark.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from recoup.numerics.formats import Format


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """How to keep the values of one format.

    Args:
        grid: the format.
        unit: what a kept byte is multiplied by; None where bytes are the format's codes.
        below: what a value that saturated downwards is clamped to, as far as a byte reaches.
        above: the same upwards. With (below, above) = (lo, hi) nothing is marked.
        holds_its_ends: a value at an end of the grid, or at the other end's mirror, does not saturate for the
            last bit of a division.
        rounds: `grid.rint` is torch.round, which works in place.
    """

    grid: Format
    unit: float | None
    below: float
    above: float
    holds_its_ends: bool
    rounds: bool

    @property
    def marks(self) -> bool:
        """A kept byte tells whether its value saturated."""
        return self.above > self.grid.hi

    @property
    def dtype(self) -> torch.dtype:
        """Of the bytes."""
        return self.grid.code_dtype if self.unit is None else torch.int8

    def rint_(self, x: Tensor) -> Tensor:
        """`grid.rint`, in place, but for the sign of zero: bytes that are integers have none."""
        return x.round_() if self.rounds else x.copy_(self.grid.rint(x))

    def pack(self, rounded: Tensor, out: Tensor) -> Tensor:
        """Bytes of float32 values on the grid, which may lie beyond its ends and are written over."""
        values = rounded.clamp_(self.below, self.above)
        if self.unit is None:
            return out.copy_(self.grid.encode(values))
        return out.copy_(values if self.unit == 1 else values.div_(self.unit))

    def unpack(self, kept: Tensor, out: Tensor) -> Tensor:
        """The values of bytes, saturated, written into a float32 tensor."""
        if self.unit is None:
            return out.copy_(self.grid.decode(kept))
        out.copy_(kept)
        if self.marks:
            out.clamp_(*self._ends)
        return out if self.unit == 1 else out.mul_(self.unit)

    def clip_(self, grad: Tensor, kept: Tensor, work: Tensor) -> Tensor:
        """A gradient, in place, with 0 where the byte says that a value saturated.

        Args:
            grad: contiguous.
            kept: the bytes.
            work: as large as the gradient, and of its dtype, which has room for every byte; is written over.
        """
        lo, hi = self._ends
        halfway = lo - 0.5, hi + 0.5  # hardtanh's gradient is 0 at its ends and beyond, and 1 between them
        return torch.ops.aten.hardtanh_backward.grad_input(grad, work.copy_(kept), *halfway, grad_input=grad)

    @property
    def _ends(self) -> tuple[float, float]:
        assert self.unit is not None, "codes say nothing of saturation"
        return self.grid.lo / self.unit, self.grid.hi / self.unit


@cache
def carrier_of(grid: Format) -> Carrier:
    """The carrier of a format.

    >>> from recoup.numerics import E2M1, E4M3, IntFormat
    >>> carrier_of(E2M1).unit, carrier_of(IntFormat(4)).above, carrier_of(E4M3).unit
    (0.5, 14.0, None)
    """
    unit, lo, hi = grid.floor, grid.lo, grid.hi
    a_little_more = float(grid.rint(torch.tensor(hi * (1 + 2.0**-20))))
    holds = a_little_more == hi and -lo >= hi
    reach = min(2 * max(-lo, hi), 2.0**10)
    quarters = torch.arange(-4 * reach, 4 * reach + 1) / 4
    rounds = torch.equal(grid.rint(quarters), quarters.round())
    codes = Carrier(grid=grid, unit=None, below=lo, above=hi, holds_its_ends=holds, rounds=rounds)
    if math.frexp(unit)[0] != 0.5:  # no power of two, so that dividing by it would round
        return codes
    numbers = grid.decode(torch.arange(2**grid.bits).to(grid.code_dtype))
    past_the_end = grid.rint(torch.linspace(1, 2, 65) * hi)
    multiples = torch.cat([numbers[numbers.isfinite()], past_the_end]) / unit
    if not torch.equal(multiples, multiples.round()) or lo / unit < -128 or hi / unit > 127:
        return codes
    below, above = (2 * lo if lo < 0 else -unit), 2 * hi
    if below / unit < -128 or above / unit > 127:
        below, above = lo, hi
    return Carrier(grid=grid, unit=unit, below=below, above=above, holds_its_ends=holds, rounds=rounds)
