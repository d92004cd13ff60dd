"""Quantize and dequantize: the specification of every lattice.

One path serves all formats. With `step = scale * global_scale`:

    q  = clamp(rint(x / step) + zero_point, lo, hi)         the value of the code, decided in float32
    x^ = (q - zero_point) * step

It divides by the step (ONNX and compressed-tensors do; torchao multiplies by the reciprocal, which
moves some codes by one), and it adds the zero point after rounding (ONNX again).
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

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
    values = shift_up(spec.format.rint(position), qparams).clamp(spec.format.lo, spec.format.hi)
    return spec.format.encode(values).reshape(x.shape)


def dequantize(codes: Shaped[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> Float[Tensor, "r c"]:
    """The float32 values that codes stand for."""
    values = spec.format.decode(cut(codes, spec.granularity))
    return (shift_down(values, qparams) * spread(qparams.step)).reshape(codes.shape)


def shift_up(values: Tensor, qparams: QParams) -> Tensor:
    """Values with the zero point added, if there is one."""
    return values if qparams.zero_point is None else values + spread(qparams.zero_point)


def shift_down(values: Tensor, qparams: QParams) -> Tensor:
    """Values with the zero point taken off, if there is one."""
    return values if qparams.zero_point is None else values - spread(qparams.zero_point)
