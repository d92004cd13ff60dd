"""Tables of levels: grids that no count of bits describes, and those of the lowest bits.

A code is the index of its level. The levels of these formats are fractions of a range, so that their scale
is the range's end: the largest magnitude of a block.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from recoup.numerics.formats import StepGradient

_CLIP = 1 - 1e-2


@dataclass(frozen=True)
class LevelFormat:
    """Any ascending values; the nearest one wins.

    Args:
        name: what reports call it.
        levels: 2 to 256 numbers, kept as float32 has them.
        ties: whether halfway between two levels is the lower one or the upper.

    Two levels are no more than a sign, which `step_gradient` says.

    Raises:
        ValueError: levels that are not ascending and finite, too few or too many, or none of them positive.

    >>> thirds = LevelFormat("thirds", (-1.0, -0.5, 0.0, 1.0))
    >>> thirds.rint(torch.tensor([-0.8, -0.25, 0.6])), thirds.bits
    (tensor([-1.0000, -0.5000,  1.0000]), 2)
    """

    name: str
    levels: tuple[float, ...]
    ties: Literal["down", "up"] = field(default="down", kw_only=True)

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= 256:
            raise ValueError(f"{self.name}: {len(self.levels)} levels asked; 2 to 256 are possible")
        levels = torch.tensor(self._levels)
        if not (levels.isfinite().all() and (levels.diff() > 0).all()):
            raise ValueError(f"{self.name}: levels ascend in float32 and are finite; found {self.levels}")
        if self.hi <= 0:
            raise ValueError(f"{self.name}: no level is positive, the largest is {self.hi}; turn the signs")

    @cached_property
    def _levels(self) -> list[float]:
        return torch.tensor(self.levels, dtype=torch.float32).tolist()

    @property
    def _bounds(self) -> list[float]:
        return [(low + high) / 2 for low, high in pairwise(self._levels)]

    @property
    def bits(self) -> int:
        """The fewest that number all levels."""
        return (len(self.levels) - 1).bit_length()

    @property
    def mantissa_bits(self) -> int:
        """None: the levels are no binary fractions."""
        return 0

    @property
    def lo(self) -> float:
        """The first level."""
        return self._levels[0]

    @property
    def hi(self) -> float:
        """The last level."""
        return self._levels[-1]

    @property
    def floor(self) -> float:
        """The smallest positive level."""
        return next(level for level in self._levels if level > 0)

    @property
    def has_zero(self) -> bool:
        """0 is among the levels."""
        return 0.0 in self._levels

    @property
    def code_dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    @property
    def step_gradient(self) -> StepGradient:
        """Of two levels the value does not follow x: its slope in the scale is a sign (ParetoQ's 1 bit)."""
        return StepGradient(lo=self.lo, hi=self.hi, levels=self.hi, follows_x=len(self.levels) > 2)

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The nearest level; what lies beyond the levels stays where it is."""
        bounds = torch.tensor(self._bounds, device=x.device)
        nearest = self.decode(_bins(x, bounds, right=self.ties == "up"))
        return torch.where((x >= self.lo) & (x <= self.hi), nearest, x)

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The indices of levels."""
        levels = torch.tensor(self._levels, device=values.device)
        return _bins(values, levels, right=False).to(torch.uint8)

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The levels of indices, the last one for codes past it."""
        return torch.tensor(self._levels, device=codes.device)[codes.long().clamp(max=len(self.levels) - 1)]


def _bins(x: Float[Tensor, "*s"], bounds: Float[Tensor, " n"], *, right: bool) -> Int[Tensor, "*s"]:
    """torch.bucketize in x's own layout, of which it accepts only the plain one."""
    return torch.empty_like(x, dtype=torch.int64).copy_(torch.bucketize(x.contiguous(), bounds, right=right))


@dataclass(frozen=True)
class StretchedFormat:
    """The stretched-elastic quantizer of ParetoQ (Liu et al. 2025, arXiv:2502.02631, section 3).

    The range -1 to 1 is divided into bins of one width, and a level is the middle of its bin. So an even
    number of levels has no zero, and as many levels above it as below. Rounding is theirs, tie for tie: x is
    clipped to 0.99, and clip(x) * n - shift goes to the nearest integer, ties to even.

    Args:
        count: how many levels, 3 to 100; theirs are 3 (1.58 bits) and 4 (2 bits).

    Raises:
        ValueError: another count; two levels are `BINARY`, which rounds and learns in another way.

    >>> StretchedFormat(4).decode(torch.arange(4))
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """

    count: int

    def __post_init__(self) -> None:
        if not 3 <= self.count <= 100:  # with more, the clip lies inside the last bins
            raise ValueError(f"StretchedFormat: {self.count} levels asked; 3 to 100 are possible")
        assert self._levels  # known from here on: torch.compile cannot enter the lock of Python 3.11's cache

    @property
    def _shift(self) -> float:
        return 0.0 if self.count % 2 else 0.5

    @cached_property
    def _levels(self) -> list[float]:
        integers = torch.arange(self.count, dtype=torch.float32) - self.count // 2
        return ((integers + self._shift) / (self.count / 2)).tolist()

    @property
    def name(self) -> str:
        """As in "stretched4"."""
        return f"stretched{self.count}"

    @property
    def bits(self) -> int:
        """The fewest that number all levels: 2 for three of them."""
        return (self.count - 1).bit_length()

    @property
    def mantissa_bits(self) -> int:
        """None: the levels are no binary fractions."""
        return 0

    @property
    def lo(self) -> float:
        """The first level."""
        return self._levels[0]

    @property
    def hi(self) -> float:
        """The last level, (count - 1) / count."""
        return self._levels[-1]

    @property
    def floor(self) -> float:
        """The smallest positive level."""
        return next(level for level in self._levels if level > 0)

    @property
    def has_zero(self) -> bool:
        """Of an odd count."""
        return self.count % 2 == 1

    @property
    def code_dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    @property
    def step_gradient(self) -> StepGradient:
        """Inside is up to the clip; Q_P is an integer's of as many bits."""
        return StepGradient(lo=-_CLIP, hi=_CLIP, levels=float((self.count - 1) // 2))

    def rint(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The middle of x's bin; what lies beyond the clip stays where it is."""
        half = self.count / 2
        inside = (x >= -_CLIP) & (x <= _CLIP)
        return torch.where(inside, (torch.round(x * half - self._shift) + self._shift) / half, x)

    def encode(self, values: Float[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
        """The indices of levels."""
        integers = torch.round(values * (self.count / 2) - self._shift)
        return (integers + self.count // 2).to(torch.uint8)

    def decode(self, codes: Shaped[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The levels of indices, the last one for codes past it."""
        return torch.tensor(self._levels, device=codes.device)[codes.long().clamp(max=self.count - 1)]


# QLoRA (Dettmers et al. 2023, appendix E): quantiles of the normal distribution. The values and where ties
# go are those of bitsandbytes, csrc/kernels.cu: dQuantizeNF4.
NF4 = LevelFormat(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
)
BINARY = LevelFormat("binary", (-1.0, 1.0), ties="up")  # ParetoQ's 1 bit; 0, which it leaves at 0, becomes 1
TERNARY = StretchedFormat(3)  # ParetoQ's 1.58 bits
STRETCHED = StretchedFormat(4)  # ParetoQ's 2 bits
