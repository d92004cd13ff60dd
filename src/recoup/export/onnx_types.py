"""Which lattices ONNX has types for, from which opset, and how wide they are in a file."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import nn

from recoup.export.onnx import OPSET
from recoup.export.tracing import check_no_bag
from recoup.nn import CodedConv
from recoup.numerics import (
    BFLOAT16,
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    FLOAT16,
    FLOAT32,
    ElementFormat,
    IntFormat,
    QuantSpec,
)
from recoup.schemes import Scheme

_FLOATS: dict[ElementFormat, tuple[ir.DataType, Any]] = {
    E4M3: (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    E5M2: (ir.DataType.FLOAT8E5M2, ml_dtypes.float8_e5m2),
    E2M1: (ir.DataType.FLOAT4E2M1, ml_dtypes.float4_e2m1fn),
}
_INTEGERS = {
    (2, True): (ir.DataType.INT2, ml_dtypes.int2),
    (2, False): (ir.DataType.UINT2, ml_dtypes.uint2),
    (4, True): (ir.DataType.INT4, ml_dtypes.int4),
    (4, False): (ir.DataType.UINT4, ml_dtypes.uint4),
    (8, True): (ir.DataType.INT8, np.int8),
    (8, False): (ir.DataType.UINT8, np.uint8),
}
# In which opset QuantizeLinear and DequantizeLinear got a type (onnx, docs/Changelog.md).
_SINCE = {
    ir.DataType.FLOAT4E2M1: 23,
    ir.DataType.FLOAT8E8M0: 24,
    ir.DataType.INT2: 25,
    ir.DataType.UINT2: 25,
}
_ONNX_WITH = {23: "1.18", 24: "1.19", 25: "1.20"}
_STORED_AS_FLOAT32 = (FLOAT32, FLOAT16, BFLOAT16)


def stored_type(grid: ElementFormat) -> tuple[ir.DataType, Any]:
    """ONNX's type for codes of this format, and NumPy's; integers lie in the next wider one there is.

    Raises:
        ValueError: there is none.
    """
    if isinstance(grid, IntFormat):
        return _INTEGERS[next(bits for bits in (2, 4, 8) if grid.bits <= bits), grid.signed]
    if grid not in _FLOATS:
        raise ValueError(f"ONNX has no type for {grid.name}")
    return _FLOATS[grid]


def check(path: str, scheme: Scheme, kind: type) -> None:
    """Can ONNX's operators hold this scheme, and the installed package write it?

    Raises:
        ValueError: they cannot; names the module.
    """
    try:
        _check_weights(scheme.weights)
        if scheme.inputs is not None:
            check_inputs(scheme.inputs, kind)
    except ValueError as error:
        raise ValueError(
            f"{path}: scheme {scheme.name!r} has no form in ONNX: {error}; int2 to int8, fp8, mxfp8, mxfp4, "
            "nvfp4 and their relatives do"
        ) from None
    _check_installed(path, scheme)


def width(scheme: Scheme, kind: type) -> int:
    """The bits that a code of its weight takes in the file."""
    del kind
    return stored_type(scheme.weights.format)[0].bitwidth


def _check_weights(spec: QuantSpec) -> None:
    stored_type(spec.format)
    if spec.has_offset:
        raise ValueError("DequantizeLinear has no offset in the units of the weight")
    _check_scales(spec)


def _check_scales(spec: QuantSpec) -> None:
    if spec.global_scale != (spec.scale_format == E4M3) or spec.scale_format not in (
        *(E4M3, E8M0),
        *_STORED_AS_FLOAT32,
    ):
        beside = "under a global one" if spec.global_scale else "alone"
        raise ValueError(f"scales in {spec.scale_format.name} {beside} have no form there")


def check_inputs(spec: QuantSpec, kind: type) -> None:
    """Have inputs of a module of this type a form in ONNX's operators?

    Raises:
        ValueError: they have none.
    """
    _, dtype = stored_type(spec.format)
    if isinstance(spec.format, IntFormat) and (spec.format.bits, spec.format.narrow) != (8, False):
        # rounds to codes that the narrower grid has not
        raise ValueError(
            f"QuantizeLinear has no {spec.format.name} inputs with {spec.format.hi:g} as largest"
        )
    if spec.has_offset:
        raise ValueError("QuantizeLinear has no offset in the units of the input")
    _check_scales(spec)
    match (spec.granularity.rows, spec.granularity.columns, spec.ranges):
        case (None, None, "static" | "learned") if spec.scale_format in _STORED_AS_FLOAT32:
            return
        case (None, None, "dynamic") if dtype is np.uint8 and not spec.symmetric and _float32(spec):
            return
        case (1, _, "dynamic") if spec.symmetric and not issubclass(kind, CodedConv):
            rules = ("rceil", "pow2") if spec.scale_format == E8M0 else ("narrow",)
            if spec.scale_rule in rules and (spec.scale_format in (E8M0, E4M3) or _float32(spec)):
                return
        case _:
            pass
    raise ValueError(f"inputs {spec} ({spec.scale_rule}, {spec.scale_format.name} scales) have no form there")


def check_output(path: str, spec: QuantSpec) -> None:
    """Have quantized outputs a form in ONNX's operators? As inputs of a convolution have one.

    Raises:
        ValueError: they have none; names the module.
    """
    try:
        check_inputs(spec, CodedConv)
    except ValueError as error:
        raise ValueError(f"outputs: {path}: {error}") from None


def _float32(spec: QuantSpec) -> bool:
    return spec.scale_format == FLOAT32


def opset(*schemes: Scheme) -> int:
    """The first opset that has every type of these schemes; 21 at least, which has blocks."""
    types = {
        kind
        for scheme in schemes
        for spec in (scheme.weights, scheme.inputs)
        if spec is not None
        for kind in (stored_type(spec.format)[0], *([ir.DataType.FLOAT8E8M0] * (spec.scale_format == E8M0)))
    }
    return max((_SINCE.get(kind, OPSET) for kind in types), default=OPSET)


def _check_installed(path: str, scheme: Scheme) -> None:
    import onnx

    needed, known = opset(scheme), onnx.defs.onnx_opset_version()
    if known < needed:
        raise ValueError(
            f"{path}: scheme {scheme.name!r} needs opset {needed}, and onnx {onnx.__version__} writes up to "
            f"{known}: pip install 'onnx>={_ONNX_WITH[needed]}'"
        )


def check_all(model: nn.Module, modules: Mapping[str, tuple[Scheme, type]]) -> None:
    """See `check`; of every module. What the model itself can be is found when it is traced."""
    del model
    for path, (scheme, kind) in modules.items():
        check_no_bag(path, kind)
        check(path, scheme, kind)
