"""Binary floating point, and the powers of two that microscaling takes for scales."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from recoup.numerics.formats import StepGradient

_EXPONENT_BITS_OF_FLOAT32 = 0x7F80_0000
_SMALLEST_NORMAL = 2.0**-126


def power_of_two_below(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The largest power of two that is at most |x|; 0 for subnormal x, infinity for infinity and NaN.

    Exact: it is x with its sign and mantissa bits cleared.

    >>> power_of_two_below(torch.tensor([0.75, 1.0, -7.9]))
    tensor([0.5000, 1.0000, 4.0000])
    """
    return (x.float().view(torch.int32) & _EXPONENT_BITS_OF_FLOAT32).view(torch.float32)


@dataclass(frozen=True)
class FloatFormat:
    """Binary floating point with subnormals: sign, exponent, mantissa.

    Args:
        exponent_bits: 1 to 8.
        mantissa_bits: 0 to 23.
        specials: which codes are not numbers. "none": every code is a number (FP4, FP6; OCP
            Microscaling v1.0, section 5.3). "nan": the all-ones code is NaN and there is no infinity
            (E4M3 of OCP 8-bit floating point, v1.0). "ieee": the top exponent holds infinity and NaN.

    The bias is IEEE's, 2^(exponent_bits - 1) - 1. Rounding keeps the sign of zero.

    Raises:
        ValueError: bit counts that float32 arithmetic cannot hold, or that leave no number above 0.

    >>> FloatFormat(2, 1).hi, FloatFormat(4, 3, specials="nan").hi, FloatFormat(5, 2, specials="ieee").hi
    (6.0, 448.0, 57344.0)
    """

    exponent_bits: int
    mantissa_bits: int
    specials: Literal["none", "nan", "ieee"] = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 23):
            raise ValueError(
                f"FloatFormat: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits asked; "
                "1 to 8 and 0 to 23 are possible"
            )
        if self.exponent_bits == 8 and self.specials != "ieee":
            raise ValueError('FloatFormat: 8 exponent bits reach past float32 unless specials="ieee"')
        if self._largest_number < 1:
            raise ValueError(
                f'FloatFormat: {self.name} with specials="{self.specials}" has no number above 0; '
                'use specials="none", or more bits'
            )
        if self.bits <= 8:
            assert (
                self._values
            )  # known from here on: torch.compile cannot enter the lock of Python 3.11's cache

    @property
    def name(self) -> str:
        """As in "e2m1"."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa together."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def _smallest_exponent(self) -> int:
        return 1 - self.bias

    @property
    def hi(self) -> float:
        """The largest finite value."""
        return self._value(self._largest_number)

    @property
    def _largest_number(self) -> int:
        codes_above = {"none": 0, "nan": 1, "ieee": 2**self.mantissa_bits}[self.specials]
        return 2 ** (self.bits - 1) - 1 - codes_above

    def _value(self, magnitude: int) -> float:
        field_, mantissa = divmod(magnitude, 2**self.mantissa_bits)
        if magnitude > self._largest_number:
            return float("inf") if self.specials == "ieee" and mantissa == 0 else float("nan")
        significand = mantissa + 2**self.mantissa_bits * (field_ > 0)  # field 0 has no leading one
        return significand * 2.0 ** (max(field_, 1) - self.bias - self.mantissa_bits)

    @property
    def lo(self) -> float:
        """The most negative finite value."""
        return -self.hi

    @property
    def floor(self) -> float:
        """The smallest positive value, or float32's smallest normal one if that is larger."""
        return max(2.0 ** (self._smallest_exponent - self.mantissa_bits), _SMALLEST_NORMAL)

    @property
    def has_zero(self) -> bool:
        """Always, and with a sign."""
        return True

    @property
    def code_dtype(self) -> torch.dtype:
        """uint8: formats of up to 8 bits have codes; wider ones serve for scales only."""
        return torch.uint8

    @property
    def step_gradient(self) -> StepGradient:
        """LSQ's formula, with the largest value for Q_P."""
        return StepGradient(lo=self.lo, hi=self.hi, levels=self.hi)

    def _ulp(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        binade = power_of_two_below(x).clamp(2.0**self._smallest_exponent, 2.0**127)
        return binade * 2.0**-self.mantissa_bits

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The nearest value, ties to the even code, as if the exponent had no upper end."""
        ulp = self._ulp(x)
        significand = torch.round(x / ulp)
        if self.mantissa_bits == 0:  # then a code is an exponent, and 1.5 times an even one goes down
            even = ((ulp.view(torch.int32) >> 23) - 127 + self.bias) % 2 == 0
            significand = torch.where(even & (x.abs() == 1.5 * ulp), significand / 2, significand)
        return significand * ulp

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The bit patterns of values that lie on the grid, sign in the highest bit."""
        ulp = self._ulp(values)
        mantissa = (values.abs() / ulp).to(torch.int32)  # with its leading one, for normal values
        # The leading one carries into the exponent field, which is how subnormals get field 0.
        exponent = (ulp.view(torch.int32) >> 23) - 127 + self.mantissa_bits
        magnitude = mantissa + ((exponent - self._smallest_exponent) << self.mantissa_bits)
        return (magnitude + (torch.signbit(values).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The values of bit patterns; NaN and infinity where the format has them."""
        return torch.tensor(self._values, device=codes.device)[codes.long()]

    @cached_property
    def _values(self) -> list[float]:
        """The value of every code, in order."""
        magnitudes = [self._value(magnitude) for magnitude in range(2 ** (self.bits - 1))]
        return magnitudes + [-magnitude for magnitude in magnitudes]


@dataclass(frozen=True)
class PowerOfTwo:
    """E8M0, the scale of OCP Microscaling v1.0 (section 5.4): 2^(code - 127), code 255 is NaN, no zero.

    >>> PowerOfTwo().encode(torch.tensor([0.5, 1.0, 2.0]))
    tensor([126, 127, 128], dtype=torch.uint8)
    """

    @property
    def name(self) -> str:
        """As the specification calls it."""
        return "e8m0"

    @property
    def bits(self) -> int:
        """One byte."""
        return 8

    @property
    def mantissa_bits(self) -> int:
        """None: a power of two is its leading one."""
        return 0

    @property
    def lo(self) -> float:
        """The smallest value: there is neither a sign nor a zero."""
        return 2.0**-127

    @property
    def hi(self) -> float:
        """The largest value."""
        return 2.0**127

    @property
    def floor(self) -> float:
        """The smallest value."""
        return self.lo

    @property
    def has_zero(self) -> bool:
        """There is none."""
        return False

    @property
    def code_dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    @property
    def step_gradient(self) -> StepGradient:
        """As any format's; scales are no elements, so nothing asks."""
        return StepGradient(lo=self.lo, hi=self.hi, levels=self.hi)

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The nearest power of two, ties away from zero (there are no even ones); 0 becomes the smallest.

        The MX rules of `scale_rules.py` give powers of two already, which this leaves as they are.
        """
        binade = power_of_two_below(x).clamp(min=self.lo)
        return binade * torch.where(x >= 1.5 * binade, 2.0, 1.0)

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The biased exponents."""
        exponents = values.view(torch.int32) >> 23
        return exponents.to(torch.uint8)

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """2^(code - 127)."""
        values = [2.0 ** (code - 127) for code in range(255)] + [float("nan")]
        return torch.tensor(values, device=codes.device)[codes.long()]


E2M1 = FloatFormat(2, 1)  # FP4; OCP Microscaling v1.0, table 5
E2M3 = FloatFormat(2, 3)  # FP6
E3M2 = FloatFormat(3, 2)  # FP6
E4M3 = FloatFormat(4, 3, specials="nan")  # FP8; OCP 8-bit floating point v1.0, "E4M3FN" elsewhere
E5M2 = FloatFormat(5, 2, specials="ieee")
E8M0 = PowerOfTwo()
FLOAT16 = FloatFormat(5, 10, specials="ieee")
BFLOAT16 = FloatFormat(8, 7, specials="ieee")
FLOAT32 = FloatFormat(8, 23, specials="ieee")
