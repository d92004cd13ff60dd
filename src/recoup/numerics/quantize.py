"""Quantize, dequantize, and both at once with a gradient: the specification of every lattice.

One path serves all formats. With `step = scale * global_scale`:

    q  = clamp(rint(x / step) + zero_point, lo, hi)         the value of the code, decided in float32
    x^ = (q - zero_point) * step

It divides by the step (ONNX and compressed-tensors do; torchao multiplies by the reciprocal, which
moves some codes by one), and it adds the zero point after rounding (ONNX again).
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from recoup.numerics.formats import FLOAT32
from recoup.numerics.granularity import cut, extrema, spread
from recoup.numerics.scale_rules import SCALE_RULES
from recoup.numerics.spec import QParams, QuantSpec, storable


def choose_global_scale(amax: Float[Tensor, ""], spec: QuantSpec) -> Float[Tensor, ""] | None:
    """The scale of the scales, from the largest |x| of the whole tensor; None where the spec has none.

    NVIDIA's NVFP4 recipe: the largest block scale becomes the largest value of `scale_format`.
    """
    if not spec.global_scale:
        return None
    scale = amax.float() / (spec.format.hi * spec.scale_format.hi)
    smallest = FLOAT32.floor / spec.scale_format.floor  # so that scale * global_scale is never 0
    return torch.where(amax > 0, scale.clamp(min=smallest), 1.0)


def choose_qparams(
    lo: Float[Tensor, "br bc"],
    hi: Float[Tensor, "br bc"],
    spec: QuantSpec,
    global_scale: Float[Tensor, ""] | None = None,
) -> QParams:
    """Scale and zero point for blocks whose values lie in [lo, hi].

    Args:
        lo: smallest value of every block.
        hi: largest value. Zero always counts as inside, so that 0.0 quantizes to exactly 0.
        spec: the lattice; its rule and its scale format decide.
        global_scale: a calibrated one; by default that of the largest block.

    Returns:
        QParams whose scale lies on `spec.scale_format`. A block of zeros has scale 1.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(8), granularity=per_tensor, scale_rule="narrow", ranges="dynamic")
    >>> choose_qparams(torch.tensor([[-1.0]]), torch.tensor([[12.7]]), spec).scale
    tensor([[0.1000]])
    """
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)
    if spec.global_scale and global_scale is None:
        global_scale = choose_global_scale(torch.maximum(-lo, hi).amax(), spec)
    scale = SCALE_RULES[spec.scale_rule](lo, hi, spec.format)
    if global_scale is not None:
        scale = scale / global_scale
    scale = torch.where(lo == hi, 1.0, storable(scale, spec.scale_format))
    return QParams(scale=scale, zero_point=_zero_point(lo, scale, spec), global_scale=global_scale)


def _zero_point(lo: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor | None:
    if spec.symmetric:
        return None
    smallest, largest = spec.format.lo, spec.format.hi
    return (smallest - torch.round(lo / scale)).clamp(smallest, largest).to(torch.int32)


def qparams_of(x: Float[Tensor, "r c"], spec: QuantSpec, global_scale: Tensor | None = None) -> QParams:
    """The qparams of x's own extrema: what "dynamic" means, and round-to-nearest for a weight."""
    return choose_qparams(*extrema(x, spec.granularity), spec, global_scale)


def quantize(x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> Shaped[Tensor, "r c"]:
    """The codes of x, one to a byte: integers, or bit patterns of a float format.

    The decision is made in float32 whatever x's dtype.

    >>> from recoup.numerics import E2M1, per_tensor
    >>> spec = QuantSpec(format=E2M1, granularity=per_tensor, scale_rule="narrow", ranges="dynamic")
    >>> x = torch.tensor([[6.0, -3.0, 0.3]])
    >>> quantize(x, qparams_of(x, spec), spec)
    tensor([[ 7, 13,  1]], dtype=torch.uint8)
    """
    position = cut(x, spec.granularity).float() / spread(qparams.step)
    values = _shift_up(spec.format.rint(position), qparams).clamp(spec.format.lo, spec.format.hi)
    return spec.format.encode(values).reshape(x.shape)


def dequantize(codes: Shaped[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> Float[Tensor, "r c"]:
    """The float32 values that codes stand for."""
    values = spec.format.decode(cut(codes, spec.granularity))
    return (_shift_down(values, qparams) * spread(qparams.step)).reshape(codes.shape)


def fake_quantize(x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> Float[Tensor, "r c"]:
    """`dequantize(quantize(x))` in x's dtype, with a gradient for x and for a scale that requires one.

    The gradient of x is straight-through (Bengio et al. 2013), `spec.gradient` says which. With
    `ranges="learned"` the scale's is that of learned step size quantization (LSQ, Esser et al. 2020,
    sections 2.1 and 2.2): inside the range q - x / step, outside it the bound, times
    1 / sqrt(elements per scale * hi); "inside" is then asked of x / step before rounding.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(4), granularity=per_tensor, scale_rule="narrow", ranges="static")
    >>> fake_quantize(torch.tensor([[0.9, -3.0]]), QParams(scale=torch.tensor([[0.25]])), spec)
    tensor([[ 1., -2.]])
    """
    return cast(
        Tensor,
        _FakeQuantize.apply(x, qparams.scale, qparams.zero_point, qparams.global_scale, spec),
    )


def _shift_up(values: Tensor, qparams: QParams) -> Tensor:
    return values if qparams.zero_point is None else values + spread(qparams.zero_point)


def _shift_down(values: Tensor, qparams: QParams) -> Tensor:
    return values if qparams.zero_point is None else values - spread(qparams.zero_point)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch types it as one class for forward and another for backward
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        global_scale: Tensor | None,
        spec: QuantSpec,
    ) -> Tensor:
        qparams = QParams(scale=scale, zero_point=zero_point, global_scale=global_scale)
        step = spread(qparams.step)
        position = cut(x, spec.granularity).float() / step
        rounded = _shift_up(spec.format.rint(position), qparams)
        saturated = rounded.clamp(spec.format.lo, spec.format.hi)
        values = _shift_down(saturated, qparams)

        if spec.ranges == "learned":  # LSQ asks before rounding whether a value is inside
            unrounded = _shift_up(position, qparams)
            inside = unrounded == unrounded.clamp(spec.format.lo, spec.format.hi)
            slope = torch.where(inside, values - position, values)
        else:
            inside, slope = rounded == saturated, None
        ctx.save_for_backward(inside if spec.gradient == "clipped" else None, slope, global_scale)
        ctx.spec = spec
        # The cast before the reshape: torch 2.11 drops the gradient of a compiled function that ends in a
        # cast to the dtype it has already.
        return (values * step).to(x.dtype).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inside, slope, global_scale = cast(Any, ctx).saved_tensors
        spec: QuantSpec = cast(Any, ctx).spec
        grad_x = grad if inside is None else grad * inside.reshape(grad.shape)
        if slope is None:
            return grad_x, None, None, None, None
        per_scale = spec.granularity.elements_per_scale(*grad.shape)
        grad_scale = (cut(grad, spec.granularity).float() * slope).sum(dim=(1, 3))
        grad_scale = grad_scale / (per_scale * spec.format.hi) ** 0.5
        return grad_x, grad_scale if global_scale is None else grad_scale * global_scale, None, None, None
