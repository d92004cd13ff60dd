"""How to quantize one tensor (`QuantSpec`), and what that comes to for a given tensor (`QParams`)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from recoup.numerics.floats import E2M1, FLOAT32, FloatFormat, PowerOfTwo
from recoup.numerics.formats import Format
from recoup.numerics.granularity import Granularity
from recoup.numerics.integers import FixedFormat, IntFormat
from recoup.numerics.levels import LevelFormat, StretchedFormat
from recoup.numerics.scale_rules import LARGEST_SCALE, POWERS_OF_TWO, SCALE_RULES, VALUE_RULES, ScaleRule

Ranges = Literal["dynamic", "static", "learned"]
Gradient = Literal["clipped", "pass-through"]
ElementFormat = IntFormat | FixedFormat | FloatFormat | LevelFormat | StretchedFormat


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How to quantize one tensor: the engine's own lattice, written down.

    Args:
        format: the grid of the elements.
        granularity: how many elements share a scale.
        scale_rule: from a block's values to its scale; "affine" is the one with a zero point, "min-max" the
            one with an offset.
        scale_format: the grid the scales, and offsets, are stored on.
        global_scale: the block scales are themselves scaled, by one float32 per tensor (NVFP4). It is
            amax / (format.hi * scale_format.hi), a multiplier.
        ranges: "dynamic" takes scales from each tensor as it comes, "static" keeps calibrated ones,
            "learned" trains them from the calibrated ones on.
        gradient: the straight-through gradient of the input. "clipped" is 0 where the value saturates,
            "pass-through" is 1 everywhere.

    Raises:
        ValueError: a combination that means nothing; the message says what to change.
    """

    format: ElementFormat
    granularity: Granularity
    scale_rule: ScaleRule
    scale_format: FloatFormat | PowerOfTwo = FLOAT32
    global_scale: bool = False
    ranges: Ranges
    gradient: Gradient = "clipped"

    def __post_init__(self) -> None:
        if self.scale_rule not in (*SCALE_RULES, *VALUE_RULES):
            known = ", ".join((*SCALE_RULES, *VALUE_RULES))
            raise ValueError(f"scale rule {self.scale_rule!r} asked; there are {known}")
        if self.format.bits > 8:
            raise ValueError(f"{self.format.name} has {self.format.bits} bits: a code is one byte, 8 at most")
        if self.format.lo >= 0 and self.symmetric:
            raise ValueError(
                f'{self.format.name} has no negative values: use scale_rule="affine", or a signed format'
            )
        if self.has_zero_point and not isinstance(self.format, IntFormat):
            raise ValueError(
                f'{self.format.name}: scale_rule="affine" adds a zero point, which only integers have'
            )
        if self.scale_rule in ("signed-max", "min-max") and self.scale_format.lo > 0:
            stored = "scales" if self.scale_rule == "signed-max" else "offsets"
            raise ValueError(
                f"{self.scale_rule} gives negative {stored}, which {self.scale_format.name} cannot hold"
            )
        if self.has_offset and self.global_scale:
            raise ValueError(
                "min-max stores an offset beside each scale, which a global scale does not reach"
            )
        if self.scale_rule == "four-over-six" and self.format != E2M1:
            raise ValueError(
                f"four-over-six is a choice between two values of e2m1; {self.format.name} asked"
            )
        if (
            self.ranges == "learned"
            and self.scale_rule in POWERS_OF_TWO
            and self.scale_format.mantissa_bits > 0
        ):
            raise ValueError(
                f"{self.scale_rule}: a learned scale leaves the powers of two where {self.scale_format.name} "
                "stores it; use scale_format=E8M0"
            )

    @property
    def has_zero_point(self) -> bool:
        """An integer is added to the codes, so that 0.0 is one of them."""
        return self.scale_rule == "affine"

    @property
    def has_offset(self) -> bool:
        """A number in x's units is taken off before rounding; 0.0 need not be representable."""
        return self.scale_rule == "min-max"

    @property
    def symmetric(self) -> bool:
        """There is neither a zero point nor an offset."""
        return not (self.has_zero_point or self.has_offset)

    @property
    def keeps_zero(self) -> bool:
        """0.0 quantizes to exactly 0."""
        return self.format.has_zero and not self.has_offset

    @property
    def needs_values(self) -> bool:
        """The scale follows from a block's values, and not from its extrema alone."""
        return self.scale_rule in VALUE_RULES

    @property
    def largest_scale(self) -> float:
        """What the largest block's scale becomes under a global one."""
        return LARGEST_SCALE.get(self.scale_rule, self.scale_format.hi)

    @property
    def bits_per_scale(self) -> int:
        """Stored beside every block: the scale, and the zero point or the offset where there is one."""
        beside = self.format.bits if self.has_zero_point else self.scale_format.bits * self.has_offset
        return self.scale_format.bits + beside

    def __str__(self) -> str:
        return f"{self.format.name} per {self.granularity}, {self.ranges}"


@dataclass(frozen=True, kw_only=True)
class QParams:
    """Scale, zero point or offset, and global scale of one tensor.

    Every scale and offset lies on its spec's `scale_format`. `zero_point` is there for "affine" only, and
    `offset` for "min-max" only; `global_scale` is None for specs without one. A zero point is int32, or
    float32 where it is learned and has a gradient.
    """

    scale: Float[Tensor, "br bc"]
    zero_point: Shaped[Tensor, "br bc"] | None = None
    offset: Float[Tensor, "br bc"] | None = None
    global_scale: Float[Tensor, ""] | None = None

    @property
    def step(self) -> Float[Tensor, "br bc"]:
        """The distance between neighbouring integers of the grid: what a code is multiplied by."""
        return self.scale if self.global_scale is None else self.scale * self.global_scale


def on_grid(x: Float[Tensor, "br bc"], grid: Format) -> Float[Tensor, "br bc"]:
    """Rounded and saturated: how an offset is stored."""
    return grid.rint(x).clamp(grid.lo, grid.hi)


def storable(scale: Float[Tensor, "br bc"], grid: Format) -> Float[Tensor, "br bc"]:
    """The scales, moved onto their own grid: rounded, saturated, and never closer to zero than its floor."""
    rounded = on_grid(scale, grid)
    away = torch.where(scale < 0, rounded.clamp(max=-grid.floor), rounded.clamp(min=grid.floor))
    return away.clamp(grid.lo, grid.hi)  # a grid without negative values has its smallest for them
