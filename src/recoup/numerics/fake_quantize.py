"""Both at once, with a gradient: what a model is trained through.

The forward pass is `dequantize(quantize(x))` bit for bit. The backward pass is straight-through for x, and
that of learned step size quantization for a scale, a zero point and an offset that are learned.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from recoup.numerics.granularity import cut
from recoup.numerics.quantize import position, restored, shift_down, shift_up
from recoup.numerics.spec import QParams, QuantSpec

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None, None, None]


def fake_quantize(
    x: Float[Tensor, "r c"],
    qparams: QParams,
    spec: QuantSpec,
    moved: Float[Tensor, "r c"] | None = None,
) -> Float[Tensor, "r c"]:
    """`dequantize(quantize(x))` in x's dtype, with a gradient for x and for qparams that are learned.

    The gradient of x is straight-through (Bengio et al. 2013), `spec.gradient` says which. With
    `ranges="learned"` the scale's is that of learned step size quantization (LSQ, Esser et al. 2020,
    sections 2.1 and 2.2): inside the range q - zero_point - (x - offset) / step, outside it the bound, times
    1 / sqrt(elements per scale * Q_P); "inside" is then asked of x / step before rounding. Zero points and
    offsets have theirs outside (LSQ+, Bhalgat et al. 2020, section 3.1), times the same factor. NaN stays
    NaN; infinity saturates.

    Args:
        x: gets the gradient.
        qparams: with which.
        spec: the lattice.
        moved: is rounded in the place of x, as `drawn` moves it; q above is then its code, and x still x.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(4), granularity=per_tensor, scale_rule="narrow", ranges="static")
    >>> fake_quantize(torch.tensor([[0.9, -3.0]]), QParams(scale=torch.tensor([[0.25]])), spec)
    tensor([[ 1., -2.]])
    """
    fields = (qparams.scale, qparams.zero_point, qparams.offset, qparams.global_scale)
    return cast(Tensor, _FakeQuantize.apply(x, *fields, spec, moved))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch types it as one class for forward and another for backward
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        offset: Tensor | None,
        global_scale: Tensor | None,
        spec: QuantSpec,
        moved: Tensor | None,
    ) -> Tensor:
        qparams = QParams(scale=scale, zero_point=zero_point, offset=offset, global_scale=global_scale)
        steps = position(x, qparams, spec)
        seen = steps if moved is None else position(moved, qparams, spec)
        rounded = shift_up(spec.format.rint(seen), qparams)
        saturated = rounded.clamp(spec.format.lo, spec.format.hi)
        values = shift_down(saturated, qparams)

        if spec.ranges == "learned":  # LSQ asks before rounding whether a value is inside
            learned = spec.format.step_gradient
            unrounded = shift_up(steps, qparams)
            inside = unrounded == unrounded.clamp(learned.lo, learned.hi)
            slope = torch.where(inside, values - steps, values) if learned.follows_x else values
        else:
            inside, slope = rounded == saturated, None
        asked = spec.gradient == "clipped" or (slope is not None and not spec.symmetric)
        ctx.save_for_backward(inside if asked else None, slope, qparams.step, global_scale)
        ctx.spec = spec
        # The cast before the reshape: torch 2.11 drops the gradient of a compiled function that ends in a
        # cast to the dtype it has already.
        return restored(values, qparams).to(x.dtype).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        inside, slope, step, global_scale = cast(Any, ctx).saved_tensors
        spec: QuantSpec = cast(Any, ctx).spec
        grad_x = grad * inside.reshape(grad.shape) if spec.gradient == "clipped" else grad
        if slope is None:
            return grad_x, None, None, None, None, None, None
        elements = max(spec.granularity.elements_per_scale(*grad.shape), 1)
        factor = (elements * spec.format.step_gradient.levels) ** 0.5
        blocks = cut(grad, spec.granularity).float()
        grad_scale = (blocks * slope).sum(dim=(1, 3)) / factor
        grad_scale = grad_scale if global_scale is None else grad_scale * global_scale
        if spec.symmetric:
            return grad_x, grad_scale, None, None, None, None, None
        grad_shift = (blocks * ~inside).sum(dim=(1, 3)) / factor
        if spec.has_offset:
            return grad_x, grad_scale, None, grad_shift, None, None, None
        return grad_x, grad_scale, -grad_shift * step, None, None, None, None
