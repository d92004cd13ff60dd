"""How weights and inputs lie where onnxruntime has kernels for them: what one scale is for."""

from recoup.export.onnx_types import check_inputs
from recoup.nn import CodedLinear
from recoup.numerics import E4M3, E5M2, FLOAT32, IntFormat, QuantSpec
from recoup.schemes import Scheme

_EIGHT_BIT_FLOATS = (E4M3, E5M2)


def weight_layout(spec: QuantSpec) -> str:
    """What is one scale for.

    Raises:
        ValueError: for something that onnxruntime has no kernel for.
    """
    if spec.format in _EIGHT_BIT_FLOATS and spec.scale_format == FLOAT32 and not spec.has_offset:
        return "floats"
    if not isinstance(spec.format, IntFormat) or spec.global_scale or spec.has_offset:
        raise ValueError(f"{spec.format.name} weights with {_scales(spec)} have no kernel there")
    match (spec.granularity.rows, spec.granularity.columns):
        case (1, None) if spec.symmetric and spec.format.signed:
            return "channels"
        case (1, int(group)) if group >= 16 and group & (group - 1) == 0:
            return "groups"
        case _:
            raise ValueError(
                f"weights per {spec.granularity} have no kernel there: symmetric per channel, "
                "or groups of a power of two from 16 up"
            )


def input_layout(scheme: Scheme) -> str:
    """What is one scale for, and who knows it.

    Raises:
        ValueError: for something that onnxruntime has no kernel for.
    """
    if scheme.inputs is None:
        return "in float"
    return tensor_layout(scheme.inputs, scheme.weights.granularity.columns)


def tensor_layout(spec: QuantSpec, group: int | None = None) -> str:
    """The same of any computed tensor; `group` is that of the weight it meets, None where it meets none."""
    if spec.format in _EIGHT_BIT_FLOATS and _float32_scales(spec):
        check_inputs(spec, CodedLinear)
        return "in 8-bit floats"
    if not (isinstance(spec.format, IntFormat) and spec.format.bits == 8 and _float32_scales(spec)):
        raise ValueError(f"{spec.format.name} inputs with {_scales(spec)} have no kernel there")
    symmetric = spec.format.signed and spec.scale_rule == "narrow"
    match (spec.granularity.rows, spec.granularity.columns, spec.ranges):
        case (1, None, "dynamic") if symmetric:
            return "per token"
        case (1, int(columns), "dynamic") if symmetric and columns == group:
            return "in the weights' blocks"
        case (None, None, "dynamic") if not spec.symmetric and not spec.format.signed:
            return "per tensor"
        case (None, None, "static" | "learned") if not spec.format.narrow:
            return "per tensor, static"
        case _:
            raise ValueError(f"inputs {spec} ({spec.scale_rule}) have no kernel there")


def _float32_scales(spec: QuantSpec) -> bool:
    return spec.scale_format == FLOAT32 and not spec.global_scale and not spec.has_offset


def _scales(spec: QuantSpec) -> str:
    beside = " and a global one" if spec.global_scale else " and offsets" if spec.has_offset else ""
    return f"{spec.scale_format.name} scales{beside}"


def container_bits(bits: int) -> int:
    """The width a code takes in the file: MatMulNBits knows 2, 4 and 8.

    >>> [container_bits(bits) for bits in range(2, 9)]
    [2, 4, 4, 8, 8, 8, 8]
    """
    return next(width for width in (2, 4, 8) if bits <= width)


def fits_sixteen_bits(spec: QuantSpec) -> bool:
    """Two products of such weights with uint8 inputs do, so no kernel of x86 saturates."""
    return 2 * 255 * max(-spec.format.lo, spec.format.hi) < 2**15
