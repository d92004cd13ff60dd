"""Learned scales and offsets: trained in float32, used as the engine stores them.

A forward pass projects them onto what can be stored, and gradients pass the projection as if it were not
there, or as TQT has it for powers of two. What they then train is in `fake_quantize.py`.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from recoup.numerics.formats import Format
from recoup.numerics.spec import QParams, QuantSpec, on_grid, storable


def learned_qparams(
    scale: Float[Tensor, "br bc"],
    offset: Float[Tensor, "br bc"] | None,
    global_scale: Float[Tensor, ""] | None,
    spec: QuantSpec,
) -> QParams:
    """What trained scales and offsets come to, with gradients back to both.

    An offset is the value of code 0 (beta of LSQ+, Bhalgat et al. 2020, arXiv:2004.09576): for "affine" it
    becomes the engine's zero point, for "min-max" it is stored as it is.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(4), granularity=per_tensor, scale_rule="affine", ranges="learned")
    >>> learned_qparams(torch.tensor([[0.5]]), torch.tensor([[-1.3]]), None, spec).zero_point
    tensor([[3.]])
    """
    stored = storable_straight_through(scale, spec.scale_format)
    if offset is None:
        return QParams(scale=stored, global_scale=global_scale)
    if spec.has_offset:
        kept = _Projected.apply(offset, on_grid(offset.detach(), spec.scale_format), None)
        return QParams(scale=stored, offset=cast(Tensor, kept))
    step = QParams(scale=stored, global_scale=global_scale).step
    zero_point = _ZeroPoint.apply(offset, step, spec.format.lo, spec.format.hi)
    return QParams(scale=stored, zero_point=cast(Tensor, zero_point), global_scale=global_scale)


def storable_straight_through(scale: Float[Tensor, "br bc"], grid: Format) -> Float[Tensor, "br bc"]:
    """`storable`, with a gradient: how a learned scale is used.

    On a grid with a mantissa the gradient passes as if nothing had been rounded: what is frozen is the
    distance to the stored scale. Powers of two lie at equal ratios, so there it is the exponent that is
    rounded straight through, as TQT does (Jain et al. 2019, arXiv:1903.08066, section 3.2): what is frozen is
    the ratio, and the gradient's factor is stored / scale, between 2/3 and 4/3. Beyond the grid's ends it
    passes unchanged, so that a scale finds its way back.
    """
    wanted = scale.detach()
    stored = storable(wanted, grid)
    if grid.mantissa_bits > 0:
        return cast(Tensor, _Projected.apply(scale, stored, None))
    inside = (wanted >= grid.floor) & (wanted <= grid.hi)
    return cast(Tensor, _Projected.apply(scale, stored, torch.where(inside, stored / wanted, 1.0)))


class _Projected(torch.autograd.Function):
    """The second argument, with the gradient of the first, times the third."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projected: Tensor, factor: Tensor | None) -> Tensor:
        del x
        ctx.save_for_backward(factor)
        return projected.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (factor,) = ctx.saved_tensors
        return grad if factor is None else grad * factor, None, None


class _ZeroPoint(torch.autograd.Function):
    """clamp(rint(-offset / step), lo, hi), with the gradient of -offset / step at -zero_point * step.

    So what is projected is the offset, onto multiples of the step, and saturation passes gradients too.
    """

    @staticmethod
    def forward(ctx: Any, offset: Tensor, step: Tensor, lo: float, hi: float) -> Tensor:
        zero_point = torch.round(-offset / step).clamp(lo, hi)
        ctx.save_for_backward(zero_point, step)
        return zero_point

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        zero_point, step = ctx.saved_tensors
        return -grad / step, -grad * zero_point / step, None, None
