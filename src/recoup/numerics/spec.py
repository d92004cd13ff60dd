"""How to quantize one tensor (`QuantSpec`), and what that comes to for a given tensor (`QParams`)."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recoup.numerics.formats import FLOAT32, FloatFormat, Format, IntFormat, PowerOfTwo
from recoup.numerics.granularity import Granularity
from recoup.numerics.scale_rules import SCALE_RULES, ScaleRule

Ranges = Literal["dynamic", "static", "learned"]
Gradient = Literal["clipped", "pass-through"]


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How to quantize one tensor: the engine's own lattice, written down.

    Args:
        format: the grid of the elements.
        granularity: how many elements share a scale.
        scale_rule: from a block's extrema to its scale; "affine" is the one with a zero point.
        scale_format: the grid the scales are stored on.
        global_scale: the block scales are themselves scaled, by one float32 per tensor (NVFP4). It is
            amax / (format.hi * scale_format.hi), a multiplier.
        ranges: "dynamic" takes scales from each tensor as it comes, "static" keeps calibrated ones,
            "learned" trains them from the calibrated ones on.
        gradient: the straight-through gradient of the input. "clipped" is 0 where the value saturates,
            "pass-through" is 1 everywhere.

    Raises:
        ValueError: a combination that means nothing; the message says what to change.
    """

    format: IntFormat | FloatFormat
    granularity: Granularity
    scale_rule: ScaleRule
    scale_format: FloatFormat | PowerOfTwo = FLOAT32
    global_scale: bool = False
    ranges: Ranges
    gradient: Gradient = "clipped"

    def __post_init__(self) -> None:
        if self.scale_rule not in SCALE_RULES:
            raise ValueError(f"scale rule {self.scale_rule!r} asked; there are {', '.join(SCALE_RULES)}")
        if self.format.bits > 8:
            raise ValueError(f"{self.format.name} has {self.format.bits} bits: a code is one byte, 8 at most")
        if self.format.lo == 0 and self.symmetric:
            raise ValueError(
                f'{self.format.name} has no negative values: use scale_rule="affine", or a signed format'
            )
        if not self.symmetric and not isinstance(self.format, IntFormat):
            raise ValueError(
                f'{self.format.name}: scale_rule="affine" adds a zero point, which only integers have'
            )
        if self.scale_rule == "signed-max" and self.scale_format.lo > 0:
            raise ValueError(f"signed-max gives negative scales, which {self.scale_format.name} cannot hold")

    @property
    def symmetric(self) -> bool:
        """There is no zero point."""
        return self.scale_rule != "affine"

    @property
    def bits_per_scale(self) -> int:
        """Stored beside every block: the scale, and the zero point where there is one."""
        return self.scale_format.bits + (0 if self.symmetric else self.format.bits)

    def __str__(self) -> str:
        return f"{self.format.name} per {self.granularity}, {self.ranges}"


@dataclass(frozen=True, kw_only=True)
class QParams:
    """Scale, zero point and global scale of one tensor.

    Every scale lies on its spec's `scale_format`; `zero_point` is None for symmetric specs and
    `global_scale` for those without one.
    """

    scale: Float[Tensor, "br bc"]
    zero_point: Int[Tensor, "br bc"] | None = None
    global_scale: Float[Tensor, ""] | None = None

    @property
    def step(self) -> Float[Tensor, "br bc"]:
        """The distance between neighbouring integers of the grid: what a code is multiplied by."""
        return self.scale if self.global_scale is None else self.scale * self.global_scale


def storable(scale: Float[Tensor, "br bc"], grid: Format) -> Float[Tensor, "br bc"]:
    """The scales, moved onto their own grid: rounded, saturated, and never closer to zero than its floor."""
    rounded = grid.rint(scale).clamp(grid.lo, grid.hi)
    return torch.where(scale < 0, rounded.clamp(max=-grid.floor), rounded.clamp(min=grid.floor))


def storable_straight_through(scale: Float[Tensor, "br bc"], grid: Format) -> Float[Tensor, "br bc"]:
    """`storable`, whose gradient passes as if nothing had been rounded: how a learned scale is used."""
    return cast(Tensor, _Storable.apply(scale, grid))


class _Storable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, grid: Format) -> Tensor:
        del ctx
        return storable(scale, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return grad, None
