"""Quantize and dequantize: the specification of every lattice.

One path serves all formats. With `step = scale * global_scale`:

    q  = clamp(rint((x - offset) / step) + zero_point, lo, hi)         the value of the code, in float32
    x^ = (q - zero_point) * step + offset

where at most one of offset and zero point is there. It divides by the step (ONNX and compressed-tensors
do; torchao multiplies by the reciprocal, which moves some codes by one), and it adds the zero point after
rounding (ONNX again).
"""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from recoup.numerics.floats import FLOAT32
from recoup.numerics.granularity import cut, extrema, spread
from recoup.numerics.scale_rules import SCALE_RULES, VALUE_RULES
from recoup.numerics.spec import QParams, QuantSpec, on_grid, storable


def choose_global_scale(amax: Float[Tensor, ""], spec: QuantSpec) -> Float[Tensor, ""] | None:
    """The scale of the scales, from the largest |x| of the whole tensor; None where the spec has none.

    NVIDIA's NVFP4 recipe: the largest block scale becomes `spec.largest_scale`, which is the largest value of
    `scale_format` but for four-over-six.
    """
    if not spec.global_scale:
        return None
    scale = amax.float() / (spec.format.hi * spec.largest_scale)
    smallest = FLOAT32.floor / spec.scale_format.floor  # so that scale * global_scale is never 0
    return torch.where(amax == 0, 1.0, scale.clamp(min=smallest))


def choose_qparams(
    lo: Float[Tensor, "br bc"],
    hi: Float[Tensor, "br bc"],
    spec: QuantSpec,
    global_scale: Float[Tensor, ""] | None = None,
) -> QParams:
    """Scale, and zero point or offset, for blocks whose values lie in [lo, hi].

    Args:
        lo: smallest value of every block.
        hi: largest value. Zero always counts as inside, so that 0.0 quantizes to exactly 0; "min-max" alone
            takes the bounds as they are.
        spec: the lattice; its rule and its scale format decide.
        global_scale: a calibrated one; by default that of the largest block.

    Returns:
        QParams whose scale lies on `spec.scale_format`. A block of one value, as of zeros, has scale 1; a
        block with a bound that is not finite has NaN.

    Raises:
        ValueError: the rule looks at more than extrema.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(8), granularity=per_tensor, scale_rule="narrow", ranges="dynamic")
    >>> choose_qparams(torch.tensor([[-1.0]]), torch.tensor([[12.7]]), spec).scale
    tensor([[0.1000]])
    """
    if spec.needs_values:
        raise ValueError(
            f"{spec.scale_rule} chooses scales by a block's values, and here are only its extrema; "
            "use qparams_of, or a rule that extrema decide"
        )
    lo, hi = lo.float(), hi.float()
    if not spec.has_offset:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if spec.global_scale and global_scale is None:
        global_scale = choose_global_scale(torch.maximum(-lo, hi).amax(), spec)
    scale = SCALE_RULES[spec.scale_rule](lo, hi, spec.format)
    scale = _stored(scale, lo == hi, lo.isfinite() & hi.isfinite(), spec, global_scale)
    return QParams(
        scale=scale,
        zero_point=_zero_point(lo, scale, spec) if spec.has_zero_point else None,
        offset=on_grid(lo - spec.format.lo * scale, spec.scale_format) if spec.has_offset else None,
        global_scale=global_scale,
    )


def _stored(
    scale: Float[Tensor, "br bc"],
    empty: Bool[Tensor, "br bc"],
    finite: Bool[Tensor, "br bc"],
    spec: QuantSpec,
    global_scale: Tensor | None,
) -> Float[Tensor, "br bc"]:
    """The scale as it is stored: under the global one, on its grid, 1 for an empty range, NaN without one."""
    scale = scale if global_scale is None else scale / global_scale
    stored = torch.where(empty, 1.0, storable(scale, spec.scale_format))
    return torch.where(finite, stored, torch.nan)


def _zero_point(lo: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    smallest, largest = spec.format.lo, spec.format.hi
    return (smallest - torch.round(lo / scale)).clamp(smallest, largest).to(torch.int32)


def qparams_of(x: Float[Tensor, "r c"], spec: QuantSpec, global_scale: Tensor | None = None) -> QParams:
    """The qparams of x's own values: what "dynamic" means, and round-to-nearest for a weight."""
    lo, hi = extrema(x, spec.granularity)
    if not spec.needs_values:
        return choose_qparams(lo, hi, spec, global_scale)
    amax = torch.maximum(-lo, hi)
    if spec.global_scale and global_scale is None:
        global_scale = choose_global_scale(amax.amax(), spec)
    candidates = VALUE_RULES[spec.scale_rule](cut(x.float(), spec.granularity).abs(), spec.format)
    first, *others = (_stored(scale, amax == 0, amax.isfinite(), spec, global_scale) for scale in candidates)
    if not others:
        return QParams(scale=first, global_scale=global_scale)
    best, least = first, _error(x, first, spec, global_scale)
    for scale in others:
        error = _error(x, scale, spec, global_scale)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return QParams(scale=best, global_scale=global_scale)


def _error(x: Tensor, scale: Tensor, spec: QuantSpec, global_scale: Tensor | None) -> Tensor:
    """The sum of |error| of every block under these scales."""
    qparams = QParams(scale=scale, global_scale=global_scale)
    values = spec.format.rint(position(x, qparams, spec)).clamp(spec.format.lo, spec.format.hi)
    return (values * spread(qparams.step) - cut(x.float(), spec.granularity)).abs().sum(dim=(1, 3))


def quantize(x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> Shaped[Tensor, "r c"]:
    """The codes of x, one to a byte: integers, indices of levels, or bit patterns of a float format.

    The decision is made in float32 whatever x's dtype.

    Raises:
        ValueError: x or a scale is not finite, which no code could say. Not asked inside of `torch.compile`.

    >>> from recoup.numerics import E2M1, per_tensor
    >>> spec = QuantSpec(format=E2M1, granularity=per_tensor, scale_rule="narrow", ranges="dynamic")
    >>> x = torch.tensor([[6.0, -3.0, 0.3]])
    >>> quantize(x, qparams_of(x, spec), spec)
    tensor([[ 7, 13,  1]], dtype=torch.uint8)
    """
    if not torch.compiler.is_compiling() and not (is_finite(x) and is_finite(qparams.step)):
        raise ValueError("codes of NaN or infinity asked, and there are none; look where the tensor got them")
    values = shift_up(spec.format.rint(position(x, qparams, spec)), qparams)
    return spec.format.encode(values.clamp(spec.format.lo, spec.format.hi)).reshape(x.shape)


def dequantize(codes: Shaped[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> Float[Tensor, "r c"]:
    """The float32 values that codes stand for."""
    values = shift_down(spec.format.decode(cut(codes, spec.granularity)), qparams)
    return restored(values, qparams).reshape(codes.shape)


def is_finite(x: Tensor) -> bool:
    """No NaN and no infinity, asked in one pass; an answer, so it waits for the device."""
    bounds = x.aminmax() if x.numel() > 1 else [x] * x.numel()
    return all(math.isfinite(bound.item()) for bound in bounds)


def position(
    x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec
) -> Float[Tensor, "br rows bc columns"]:
    """The values in steps from the offset, cut into blocks."""
    blocks = cut(x, spec.granularity).float()
    blocks = blocks if qparams.offset is None else blocks - spread(qparams.offset)
    return blocks / spread(qparams.step)


def restored(
    values: Float[Tensor, "br rows bc columns"], qparams: QParams
) -> Float[Tensor, "br rows bc columns"]:
    """The inverse of `position`."""
    scaled = values * spread(qparams.step)
    return scaled if qparams.offset is None else scaled + spread(qparams.offset)


def shift_up(values: Tensor, qparams: QParams) -> Tensor:
    """Values with the zero point added, if there is one."""
    return values if qparams.zero_point is None else values + spread(qparams.zero_point)


def shift_down(values: Tensor, qparams: QParams) -> Tensor:
    """Values with the zero point taken off, if there is one."""
    return values if qparams.zero_point is None else values - spread(qparams.zero_point)
