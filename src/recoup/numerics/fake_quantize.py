"""Both at once, with a gradient: what a model is trained through.

The forward pass is `dequantize(quantize(x))` bit for bit. The backward pass is straight-through for x, and
that of learned step size quantization for a scale that is learned.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from recoup.numerics.granularity import cut, spread
from recoup.numerics.quantize import shift_down, shift_up
from recoup.numerics.spec import QParams, QuantSpec


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
        rounded = shift_up(spec.format.rint(position), qparams)
        saturated = rounded.clamp(spec.format.lo, spec.format.hi)
        values = shift_down(saturated, qparams)

        if spec.ranges == "learned":  # LSQ asks before rounding whether a value is inside
            unrounded = shift_up(position, qparams)
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
