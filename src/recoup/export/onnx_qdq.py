"""Any lattice that ONNX has types for, in ONNX's own operators: QuantizeLinear and DequantizeLinear.

    weights   codes in their own type -> DequantizeLinear, one scale for all, for a row, or for a block of one
    inputs    static: QuantizeLinear -> DequantizeLinear with stored scales
              dynamic, per token or in groups: amax / largest value in nodes, then Div, the pair, Mul
              dynamic, per tensor: DynamicQuantizeLinear -> DequantizeLinear

    scales    as in the lattice                            where the file has them
    float32   also float16's and bfloat16's                float32
    E8M0      powers of two (MX)                           float8e8m0; of inputs by Cast, rounded up
    E4M3      under one float32 (NVFP4)                    float8e4m3fn -> DequantizeLinear by the float32

What follows is a product in float32. An engine that knows the pattern takes the pairs away and multiplies
codes; one that does not computes what is written. A weight lies as it was trained, (out, in), so neighbours
of a group are neighbours in the file.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import nn

from recoup.export import onnx as writer
from recoup.export.onnx_graph import Array, Graph
from recoup.export.onnx_types import opset, stored_type
from recoup.nn import (
    Batch,
    CodedConv,
    CodedConvTranspose,
    CodedEmbedding,
    CodedLinear,
    Codes,
    FakeQuantizer,
    is_coded,
)
from recoup.numerics import E4M3, E8M0, IntFormat, QuantSpec
from recoup.schemes import Scheme

_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def kernel(scheme: Scheme, kind: type) -> str:
    """The operators that hold it; what an engine fuses them to is the engine's."""
    operators = {CodedEmbedding: "Gather", CodedConvTranspose: "ConvTranspose", CodedConv: "Conv"}
    operator = next((name for known, name in operators.items() if issubclass(kind, known)), "MatMul")
    pairs = "weights" if scheme.inputs is None else "weights and inputs"
    return f"{operator} behind DequantizeLinear of {pairs}"


def write(model: nn.Module, folder: Path, example: Batch) -> None:
    """Write `model` as folder/model.onnx, with these nodes for every quantized module.

    Raises:
        ValueError: see `onnx.write`.
    """
    schemes = [module.scheme for module in model.modules() if is_coded(module)]
    nodes = {CodedLinear: linear, CodedConv: conv, CodedEmbedding: embedding, FakeQuantizer: output}
    writer.write(model, folder, example, lowering=nodes, opset=opset(*schemes), with_cache=False)


def linear(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    """The equation: y = Q(x) W^T + b."""
    weight = g("Transpose", dequantized(g, module.weight), perm=[1, 0])
    y = g("MatMul", inputs(g, module.scheme.inputs, module.input_quantizer, x, module.in_features), weight)
    return y if module.bias is None else g("Add", y, _bias(g, module))


def conv(g: Graph, module: CodedConv, x: ir.Value) -> ir.Value:
    """The convolution, with its input's pair before any padding and its weight's DequantizeLinear at it."""
    x = inputs(g, module.scheme.inputs, module.input_quantizer, x, None)
    if isinstance(module, CodedConvTranspose):
        return convolved(g, module, x, _dequantized_transposed(g, module))
    return convolved(g, module, x, dequantized(g, module.weight, module.kernel_size))


def _dequantized_transposed(g: Graph, module: CodedConvTranspose) -> ir.Value:
    """The weight (inputs, outputs of a group, places), from codes that lie so if one axis has all outputs.

    With several groups, or scales of groups of columns, none has: the codes lie as they were trained.
    """
    weight, rows = module.weight, module.out_channels
    if module.groups > 1 or weight.scale.shape not in ((rows, 1), (1, 1)):
        return put_back(g, module, dequantized(g, weight))
    codes = _codes(weight).reshape(rows, -1, *module.kernel_size).swapaxes(0, 1)
    stored, one = g.weight("codes", np.ascontiguousarray(codes)), len(weight.scale) == 1 != rows
    scale, zero_point = _stored_scale(g, weight, [] if one else [-1]), None
    if weight.zero_point is not None:
        zeros = weight.zero_point.cpu().numpy().astype(codes.dtype)
        zero_point = g.weight("zero_point", zeros.reshape([] if one else [-1]))
    return _dequantize(g, stored, scale, zero_point, **({} if one else {"axis": 1}))


def put_back(g: Graph, module: CodedConvTranspose, matrix: ir.Value) -> ir.Value:
    """A transposed convolution's weight from its 2-D view; constant, so a session computes it once."""
    outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    kernel = module.kernel_size
    of_groups = g.initializer("groups", np.array([module.groups, outputs, inputs, *kernel], np.int64))
    swapped = g("Transpose", g("Reshape", matrix, of_groups), perm=[0, 2, 1, *range(3, 3 + len(kernel))])
    shape = np.array([module.in_channels, outputs, *kernel], np.int64)
    return g("Reshape", swapped, g.initializer("shape", shape))


def convolved(g: Graph, module: CodedConv, x: ir.Value, weight: ir.Value) -> ir.Value:
    """The padding and the sum of a convolution of floats, with its bias; a transposed one is cut after."""
    # F.pad takes the last axis first, ONNX all beginnings and then all ends
    begins, ends = (list(module.edges[side::2])[::-1] for side in (0, 1))
    pads = [*begins, *ends]
    if module.padding_mode != "zeros":
        # batch and channels are axes of Pad too
        everywhere = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
        x = g("Pad", x, g.initializer("pads", everywhere), mode=_PAD_MODES[module.padding_mode])
        pads = [0] * len(pads)
    transposed: dict[str, Any] = {}
    if isinstance(module, CodedConvTranspose):
        transposed = {"output_padding": list(module.output_padding)}
    return g(
        "ConvTranspose" if transposed else "Conv",
        x,
        weight,
        *([] if module.bias is None else [_bias(g, module)]),
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        dilations=list(module.dilation),
        group=module.groups,
        pads=pads,
        **transposed,
    )


def output(g: Graph, quantizer: FakeQuantizer, x: ir.Value) -> ir.Value:
    """The pair behind a module whose output is quantized."""
    return _static(g, quantizer, x, "output")


def embedding(g: Graph, module: CodedEmbedding, ids: ir.Value) -> ir.Value:
    """The rows that are asked for."""
    return g("Gather", dequantized(g, module.weight), ids, axis=0)


def _bias(g: Graph, module: CodedLinear | CodedConv) -> ir.Value:
    assert module.bias is not None
    return g.initializer("bias", module.bias.detach().float().cpu().numpy())


def dequantized(g: Graph, weight: Codes, kernel: tuple[int, ...] = ()) -> ir.Value:
    """A weight as floats: (rows, columns), or with a kernel (rows, channels, *kernel)."""
    codes, (rows, columns) = _codes(weight), weight.codes.shape
    bands, blocks = weight.scale.shape
    by_row = bands in (1, rows) and blocks == 1
    shape = (rows, -1, *kernel)
    stored = g.weight("codes", codes.reshape(shape) if by_row and kernel else codes)
    scale = _stored_scale(g, weight, [] if by_row and bands == 1 else [-1] if by_row else [bands, blocks])
    zero_point = None
    if weight.zero_point is not None:
        zeros = weight.zero_point.cpu().numpy().astype(codes.dtype)
        zero_point = g.weight("zero_point", zeros if not by_row else zeros.reshape(-1))
    if by_row and bands == 1:
        return _dequantize(g, stored, scale, zero_point)
    if by_row:
        return _dequantize(g, stored, scale, zero_point, axis=0)
    if bands != rows:  # a band of rows shares its scales
        band = g.weight("bands", np.arange(rows, dtype=np.int64) // (rows // bands))
        scale = g("Gather", scale, band, axis=0)
        zero_point = None if zero_point is None else g("Gather", zero_point, band, axis=0)
    matrix = _dequantize(g, stored, scale, zero_point, axis=1, block_size=columns // blocks)
    return g("Reshape", matrix, g.initializer("shape", np.array(shape, np.int64))) if kernel else matrix


def _codes(weight: Codes) -> Array:
    """The codes in NumPy's type for ONNX's; a float's code is its bit pattern already."""
    _, dtype = stored_type(weight.spec.format)
    codes = weight.codes.cpu().numpy()
    return codes.astype(dtype) if isinstance(weight.spec.format, IntFormat) else codes.view(dtype)


def _stored_scale(g: Graph, weight: Codes, shape: list[int]) -> ir.Value:
    scale = weight.scale.cpu().numpy().reshape(shape)
    if weight.global_scale is not None:
        small = g.weight("scale", scale.astype(ml_dtypes.float8_e4m3fn))
        return _dequantize(g, small, g.weight("global_scale", weight.global_scale.cpu().numpy().reshape(())))
    if weight.spec.scale_format == E8M0:
        return g.weight("scale", scale.astype(ml_dtypes.float8_e8m0fnu))
    return g.weight("scale", scale)


def _dequantize(
    g: Graph, codes: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, **attributes: int
) -> ir.Value:
    """To float32, also where the scales have a narrower type."""
    if _is_e8m0(scale):
        attributes["output_dtype"] = int(ir.DataType.FLOAT)
    given = [codes, scale] if zero_point is None else [codes, scale, zero_point]
    return g("DequantizeLinear", *given, domain="", **attributes)


def _is_e8m0(scale: ir.Value) -> bool:
    stored = scale.const_value
    if stored is not None:
        return stored.dtype == ir.DataType.FLOAT8E8M0
    node = scale.producer()
    assert node is not None
    if node.op_type == "Gather":
        source = node.inputs[0]
        assert source is not None
        return _is_e8m0(source)
    return node.op_type == "Cast" and node.attributes["to"].as_int() == int(ir.DataType.FLOAT8E8M0)


def inputs(
    g: Graph, spec: QuantSpec | None, quantizer: nn.Module, x: ir.Value, features: int | None
) -> ir.Value:
    """X on the lattice of its quantizer, as floats.

    Args:
        g: where the nodes go.
        spec: of the inputs; None leaves them as they are.
        quantizer: holds the scales that are stored.
        x: (..., features).
        features: None where only one scale for all is possible.
    """
    if spec is None:
        return x
    assert isinstance(quantizer, FakeQuantizer)
    if spec.ranges != "dynamic":
        return _static(g, quantizer, x)
    if spec.granularity.rows is None:
        codes, scale, zero = g.several("DynamicQuantizeLinear", x, outputs=3)
        return _dequantize(g, codes, scale, zero)
    assert features is not None
    group = spec.granularity.columns or features
    blocks = features // group
    kind, dtype = stored_type(spec.format)
    if spec.scale_format in (E8M0, E4M3):
        scale = _dynamic_scale(g, spec, quantizer, _blocked(g, x, blocks, group), keepdims=blocks == 1)
        codes = g("QuantizeLinear", x, scale, axis=-1, block_size=group, output_dtype=int(kind))
        return _dequantize(g, codes, scale, axis=-1, block_size=group)
    # The same values by a division and a product around a pair of scale 1: OpenVINO has no blocked
    # DequantizeLinear where a batch is free.
    cut = _blocked(g, x, blocks, group)
    scale = _dynamic_scale(g, spec, quantizer, cut, keepdims=True)
    unit = g.initializer("input_unit", np.array(1, np.float32))
    zero = g.initializer("input_zero_point", np.zeros((), dtype))
    codes = g("QuantizeLinear", g("Div", cut, scale), unit, zero)
    y = g("Mul", _dequantize(g, codes, unit, zero), scale)
    return y if blocks == 1 else g("Reshape", y, g("Shape", x))


def _static(g: Graph, quantizer: FakeQuantizer, x: ir.Value, what: str = "input") -> ir.Value:
    qparams = quantizer.stored_qparams
    zero_point = 0 if qparams.zero_point is None else int(qparams.zero_point)
    _, dtype = stored_type(quantizer.spec.format)
    lattice = (
        np.array(float(qparams.scale.detach()), np.float32),
        np.array(zero_point, np.float32).astype(dtype),
    )
    if _is_rounded(x, lattice):
        return x
    scale = g.initializer(f"{what}_scale", lattice[0])
    zero = g.initializer(f"{what}_zero_point", lattice[1])
    return _dequantize(g, g("QuantizeLinear", x, scale, zero), scale, zero)


def _is_rounded(x: ir.Value, lattice: tuple[Array, Array]) -> bool:
    """Comes from a pair with this scale and zero point: rounded twice it is as rounded once."""
    node = x.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 3:
        return False
    stored = [value.const_value if value is not None else None for value in node.inputs[1:]]
    return all(
        tensor is not None and tensor.numpy().dtype == wanted.dtype and np.array_equal(tensor.numpy(), wanted)
        for tensor, wanted in zip(stored, lattice, strict=True)
    )


def _blocked(g: Graph, x: ir.Value, blocks: int, group: int) -> ir.Value:
    """(..., features) as (..., blocks, group); as it is where a token is one block."""
    if blocks == 1:
        return x
    tail = g.initializer("input_blocks", np.array([blocks, group], np.int64))
    return g("Reshape", x, g("Concat", g("Shape", x, start=0, end=-1), tail, axis=0))


def _dynamic_scale(
    g: Graph, spec: QuantSpec, quantizer: FakeQuantizer, cut: ir.Value, *, keepdims: bool
) -> ir.Value:
    """The scale of every block, amax / hi on the grid of scales, or 1 for a block of zeros."""

    def number(name: str, value: float) -> ir.Value:
        return g.initializer(f"input_{name}", np.array(value, np.float32))

    last = g.initializer("input_axis", np.array([-1], np.int64))
    amax = g("ReduceMax", g("Abs", cut), last, keepdims=int(keepdims))
    scale = g("Div", amax, number("hi", spec.format.hi))
    one, empty = number("one", 1.0), g("Equal", amax, number("zero", 0.0))
    if spec.global_scale:
        assert quantizer.global_scale is not None
        over_all = number("global_scale", float(quantizer.global_scale))
        least = number("floor", spec.scale_format.floor)
        scale = g("Where", empty, one, g("Max", g("Div", scale, over_all), least))
        return _dequantize(g, g("Cast", scale, to=int(ir.DataType.FLOAT8E4M3FN)), over_all)
    scale = g("Where", empty, one, scale)
    if spec.scale_format == E8M0:
        return g("Cast", scale, to=int(ir.DataType.FLOAT8E8M0), round_mode="up")
    return scale
