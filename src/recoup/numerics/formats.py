"""What a format is: the grid of values that a number can have once it has `bits` bits.

A format is data. It is described by a few counts or a table, everything else follows from them, and no
other file asks which kind it has in hand: every format answers the same questions.

    lo, hi          the smallest and the largest value, between which values saturate
    floor           the smallest positive value that is safe to divide by (for scale formats)
    has_zero        0 is one of the values
    rint(x)         the nearest value of the grid; beyond its ends something beyond them, not yet saturated
    encode(values)  the bit pattern of grid values, one code in each byte
    decode(codes)   the grid values of bit patterns
    step_gradient   what a learned scale's gradient has to know

The kinds are integers (`integers.py`), floating point (`floats.py`) and tables of levels (`levels.py`).
Values live in float32, in which every grid is exact. Formats know nothing of scales: see `quantize.py` for
those, and `granularity.py` for how many values share one.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepGradient:
    """What the gradient of a learned scale has to know of a format, in units of the scale.

    Args:
        lo: below it x is outside: its gradient stops, and the scale's is the lowest value.
        hi: above it x is outside.
        levels: Q_P of the gradient's factor 1 / sqrt(N Q_P) (LSQ, Esser et al. 2020, section 2.2).
        follows_x: inside, the value is x and a rounding error, so that the scale's gradient is the error.
            False where a code is no more than a sign: the scale's gradient is then the value.
    """

    lo: float
    hi: float
    levels: float
    follows_x: bool = True


@runtime_checkable
class Format(Protocol):
    """What every format answers; see the head of this file."""

    @property
    def name(self) -> str:
        """A short one, as in "int4" or "e2m1"."""
        ...

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def mantissa_bits(self) -> int:
        """Bits behind the leading one of the largest value: what the MX rule "even" rounds to."""
        ...

    @property
    def lo(self) -> float:
        """The smallest value."""
        ...

    @property
    def hi(self) -> float:
        """The largest value."""
        ...

    @property
    def floor(self) -> float:
        """The smallest positive value that is safe to divide by."""
        ...

    @property
    def has_zero(self) -> bool:
        """0 is one of the values."""
        ...

    @property
    def code_dtype(self) -> torch.dtype:
        """What `encode` returns: int8 or uint8."""
        ...

    @property
    def step_gradient(self) -> StepGradient:
        """What a learned scale's gradient has to know."""
        ...

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The nearest value, before saturation; each format says where ties go."""
        ...

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The codes of values that lie on the grid."""
        ...

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The values of codes."""
        ...
