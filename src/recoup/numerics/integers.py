"""Integers, and fixed point: integers that count parts of one."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from recoup.numerics.formats import StepGradient


@dataclass(frozen=True)
class IntFormat:
    """Integers of 2 to 8 bits; a code is the integer itself. Ties go to the even one.

    Args:
        bits: width, 2 to 8.
        signed: two's complement, or counting from 0.
        narrow: leave out the most negative value, so that the grid is symmetric around 0.

    Raises:
        ValueError: bits outside 2 to 8, or a narrow unsigned grid.

    >>> IntFormat(4).lo, IntFormat(4).hi, IntFormat(4, narrow=True).lo, IntFormat(4, signed=False).hi
    (-8.0, 7.0, -7.0, 15.0)
    """

    bits: int
    signed: bool = field(default=True, kw_only=True)
    narrow: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"IntFormat: {self.bits} bits asked; 2 to 8 are possible")
        if self.narrow and not self.signed:
            raise ValueError("IntFormat: an unsigned grid has no most negative value to leave out")

    @property
    def name(self) -> str:
        """As in "int4", "uint8"."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def mantissa_bits(self) -> int:
        """`hi` is a leading one and this many further ones."""
        return self.bits - 1 - self.signed

    @property
    def lo(self) -> float:
        """The most negative integer."""
        return float(-(2 ** (self.bits - 1)) + self.narrow) if self.signed else 0.0

    @property
    def hi(self) -> float:
        """The largest integer."""
        return float(2 ** (self.bits - self.signed) - 1)

    @property
    def floor(self) -> float:
        """The smallest positive integer."""
        return 1.0

    @property
    def has_zero(self) -> bool:
        """Always."""
        return True

    @property
    def code_dtype(self) -> torch.dtype:
        """int8 or uint8."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def step_gradient(self) -> StepGradient:
        """LSQ's own: inside up to the last integers."""
        return StepGradient(lo=self.lo, hi=self.hi, levels=self.hi)

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The nearest integer, ties to even."""
        return torch.round(x).add_(0.0)  # integers have no -0

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The integers as int8 or uint8."""
        return values.to(self.code_dtype)

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The integers as float32."""
        return codes.float()


@dataclass(frozen=True)
class FixedFormat:
    """Fixed point in two's complement: a code stands for code / 2^fraction_bits.

    It is no `IntFormat`, so that nothing takes its codes for its values.

    Args:
        bits: width, 2 to 8.
        fraction_bits: how many of them are behind the point.
        narrow: leave out the most negative value.

    Raises:
        ValueError: a width that no `IntFormat` has, or more bits behind the point than there are.

    >>> FixedFormat(8, 6).lo, FixedFormat(8, 6).hi
    (-2.0, 1.984375)
    """

    bits: int
    fraction_bits: int
    narrow: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 1 <= self.fraction_bits < self._integers.bits:
            raise ValueError(
                f"FixedFormat: {self.fraction_bits} of {self.bits} bits behind the point asked; "
                f"1 to {self.bits - 1} are possible, and IntFormat has none"
            )

    @property
    def _integers(self) -> IntFormat:
        return IntFormat(self.bits, narrow=self.narrow)

    @property
    def name(self) -> str:
        """As in "fixed8.6"."""
        return f"fixed{self.bits}.{self.fraction_bits}"

    @property
    def mantissa_bits(self) -> int:
        """`hi` is a leading one and this many further ones."""
        return self._integers.mantissa_bits

    @property
    def lo(self) -> float:
        """The most negative value."""
        return self._integers.lo * self.floor

    @property
    def hi(self) -> float:
        """The largest value."""
        return self._integers.hi * self.floor

    @property
    def floor(self) -> float:
        """The smallest positive value."""
        return 2.0**-self.fraction_bits

    @property
    def has_zero(self) -> bool:
        """Always."""
        return True

    @property
    def code_dtype(self) -> torch.dtype:
        """int8."""
        return self._integers.code_dtype

    @property
    def step_gradient(self) -> StepGradient:
        """LSQ's, with the number of positive values for Q_P."""
        return StepGradient(lo=self.lo, hi=self.hi, levels=self._integers.hi)

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The nearest value, ties to the even code."""
        return self._integers.rint(x / self.floor) * self.floor

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The values in units of the smallest positive one."""
        return self._integers.encode(values / self.floor)

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The values as float32."""
        return self._integers.decode(codes) * self.floor


MXINT8 = FixedFormat(8, 6)  # OCP Microscaling v1.0, section 5.3.4
