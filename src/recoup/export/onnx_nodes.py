"""The nodes with which onnxruntime computes exactly the trained lattice, under its default session options.

    weights        inputs              nodes
    groups         float               MatMulNBits, accuracy_level 1: float32 products
    groups         int8 blocks         MatMulNBits, accuracy_level 4: it quantizes its inputs itself, to int8,
                                       amax / 127 per block, with the blocks of the weights
    groups         int8 per token      the input's codes in plain nodes, then MatMulNBits as for float
    per channel    float               DequantizeLinear, Squeeze, MatMul
    per channel    (u)int8, any scale  the input's codes as uint8, MatMulInteger, scales
    8-bit floats   float, or the same  see onnx_qdq.py
    groups         8-bit floats        the input's pair as there, then MatMulNBits as for float
    embedding      -                   GatherBlockQuantized; 8-bit floats see onnx_qdq.py
    convolution    see onnx_conv.py

Two choices are the engine's. Accuracy level 1 is written out because the default lets a session quantize
inputs that training left in float. Inputs, and weights of 8 bits, are stored as uint8 with zero point 128: on
x86 without VNNI the sum of two products of uint8 and int8 saturates in 16 bits, while that of two
uint8 is exact everywhere. Weights of 7 bits or less do not saturate it, and are stored as int8, which has the
faster kernels. In groups, codes of 3 and of 5 to 7 bits lie in containers of 4 and 8.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from torch import nn

from recoup.export import onnx_qdq, onnx_types
from recoup.export.onnx_graph import MICROSOFT, Array, Graph
from recoup.export.onnx_layouts import (
    container_bits,
    fits_sixteen_bits,
    input_layout,
    tensor_layout,
    weight_layout,
)
from recoup.nn import CodedConv, CodedConvTranspose, CodedEmbedding, CodedLinear, Codes, FakeQuantizer
from recoup.numerics import QuantSpec
from recoup.schemes import Scheme

_RUNS = {
    CodedLinear: "w4a16, w4a8, w4a8-ort, w8a8, w8a8-ort, fp8 and their relatives",
    CodedConv: "w8a8-static, w8a8-ort, w8a8-ort-static, fp8-static and int8 weights per channel",
    CodedEmbedding: "w8a16, w4a16 and their relatives",
}


def check(path: str, scheme: Scheme, kind: type) -> None:
    """Can onnxruntime compute this?

    Raises:
        ValueError: it cannot; the message says what it can.
    """
    runs = next(schemes for types, schemes in _RUNS.items() if issubclass(kind, types))
    try:
        if issubclass(kind, CodedLinear):
            _linear_nodes(scheme)
        elif issubclass(kind, CodedConv):
            _check_convolution(scheme)
        elif weight_layout(scheme.weights) == "channels":
            raise ValueError("embeddings need integer weights in groups")
    except ValueError as error:
        raise ValueError(
            f"{path}: scheme {scheme.name!r} does not run in onnxruntime on a CPU: {error}; {runs} do"
            + _elsewhere(path, scheme, kind)
        ) from None


def check_output(path: str, spec: QuantSpec) -> None:
    """Can onnxruntime compute quantized outputs of this spec?

    Raises:
        ValueError: it cannot; names the module.
    """
    try:
        layout = tensor_layout(spec)
    except ValueError as error:
        raise ValueError(f"outputs: {path}: {error}") from None
    if layout != "per tensor, static":
        raise ValueError(f"outputs: {path}: onnxruntime has outputs in integers per tensor, not {layout}")


def _elsewhere(path: str, scheme: Scheme, kind: type) -> str:
    """Where a file of this scheme can be had nevertheless."""
    try:
        onnx_types.check(path, scheme, kind)
    except ValueError:
        return ""
    return "; the target 'onnx-qdq' writes it for other engines, such as TensorRT"


def kernel(scheme: Scheme, kind: type) -> str:
    """The operator of onnxruntime that computes it."""
    if issubclass(kind, CodedEmbedding):
        return "GatherBlockQuantized"
    layout = weight_layout(scheme.weights)
    made = "8-bit floats" if layout == "floats" else "integers"
    if issubclass(kind, CodedConv):
        if issubclass(kind, CodedConvTranspose):
            return f"ConvTranspose of {made} made float"
        integers = scheme.integer_bias and fits_sixteen_bits(scheme.weights)
        return f"{'QLinearConv, or ' * integers}Conv of {made} made float"
    if layout == "groups":
        return "MatMulNBits"
    if layout == "floats":
        return f"MatMul of {made} made float"
    if scheme.inputs is None:
        return f"MatMul of {made} made float"
    return f"MatMulInteger of uint8 by {'int8' if fits_sixteen_bits(scheme.weights) else 'uint8'}"


def width(scheme: Scheme, kind: type) -> int:
    """The bits that a code of its weight takes in the file."""
    del kind
    return container_bits(scheme.weights.format.bits) if weight_layout(scheme.weights) == "groups" else 8


def linear(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    """The nodes of a linear layer, from its input to its output."""
    nodes = _linear_nodes(module.scheme)
    y = nodes(g, module, x)
    if module.bias is None or nodes is onnx_qdq.linear:
        return y
    # onnxruntime fuses an Add into MatMulIntegerToFloat, which then scales the bias like each token
    add = "Sum" if nodes is _token_codes_then_integers else "Add"
    return g(add, y, g.initializer("bias", module.bias.detach().float().cpu().numpy()))


def embedding(g: Graph, module: CodedEmbedding, ids: ir.Value) -> ir.Value:
    """The nodes of an embedding, from ids to vectors."""
    if weight_layout(module.weight.spec) == "floats":
        return onnx_qdq.embedding(g, module, ids)
    packed = _pack(module.weight)
    codes = g.weight("codes", packed.blocks if g.tied else packed.codes)
    if g.tied:  # as MatMulNBits has it, with an axis for the blocks
        codes = g("Reshape", codes, g.initializer("shape", np.array(packed.codes.shape, np.int64)))
    return g(
        "GatherBlockQuantized",
        codes,
        ids,
        g.weight("scale", packed.scale),
        None if packed.zero_point is None else g.weight("zero_point", packed.zero_point),
        domain=MICROSOFT,
        bits=packed.bits,
        block_size=packed.group,
        gather_axis=0,
        quantize_axis=1,
    )


def _check_convolution(scheme: Scheme) -> None:
    weights, inputs = weight_layout(scheme.weights), input_layout(scheme)
    if weights == "floats" and inputs in ("in float", "in 8-bit floats"):
        return
    if weights != "channels" or inputs not in ("in float", "per tensor", "per tensor, static"):
        raise ValueError(f"convolutions with weights in {weights} and inputs {inputs} have no kernel there")


LinearNodes = Callable[[Graph, CodedLinear, ir.Value], ir.Value]


def _linear_nodes(scheme: Scheme) -> LinearNodes:
    layouts = (weight_layout(scheme.weights), input_layout(scheme))
    if layouts not in _LINEAR:
        raise ValueError(f"weights in {layouts[0]} do not go with inputs {layouts[1]}")
    weights = scheme.weights
    if (
        _LINEAR[layouts] is _blocks_in_the_kernel
        and container_bits(weights.format.bits) == 2
        and weights.granularity.columns not in (32, 64, 128)
    ):
        raise ValueError("inputs in the blocks of 2-bit weights need groups of 32, 64 or 128")
    return _LINEAR[layouts]


def _matmul_nbits(accuracy_level: int) -> LinearNodes:
    def nodes(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
        packed = _pack(module.weight)
        return g(
            "MatMulNBits",
            x,
            g.weight("codes", packed.blocks),
            g.weight("scale", packed.scale),
            None if packed.zero_point is None else g.weight("zero_point", packed.zero_point),
            domain=MICROSOFT,
            K=module.in_features,
            N=module.out_features,
            bits=packed.bits,
            block_size=packed.group,
            accuracy_level=accuracy_level,
        )

    return nodes


def _float_codes_then_nbits(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    quantized = onnx_qdq.inputs(g, module.scheme.inputs, module.input_quantizer, x, module.in_features)
    return _matmul_nbits(1)(g, module, quantized)


def _token_codes_then_nbits(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    codes, scale = _codes_per_token(g, x)
    return _matmul_nbits(1)(g, module, g("Mul", codes, scale))


def _dequantized_weight(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    # The matrix is stored with a third axis: where a DequantizeLinear of integers leads to a MatMul, at once
    # or through a Transpose, onnxruntime puts a MatMulNBits that quantizes its inputs.
    codes = g.initializer("codes", _codes(module.weight).T[None].copy())
    scale = g.initializer("scale", module.weight.scale.cpu().numpy().reshape(-1))
    weight = g("DequantizeLinear", codes, scale, axis=2)
    return g("MatMul", x, g("Squeeze", weight, g.initializer("axis", np.array([0], np.int64))))


def _integer_product(
    g: Graph, module: CodedLinear, x: ir.Value, zero_point: ir.Value, scale: ir.Value
) -> ir.Value:
    stored, zero = _codes(module.weight).T, 0
    if not fits_sixteen_bits(module.weight.spec):
        stored, zero = (stored.astype(np.int16) + 128).astype(np.uint8), 128
    codes = g.initializer("codes", stored.copy())
    weight_zero = g.initializer("zero_point", np.array(zero, stored.dtype))
    weight_scale = g.initializer("scale", module.weight.scale.cpu().numpy().reshape(-1))
    total = g("Cast", g("MatMulInteger", x, codes, zero_point, weight_zero), to=int(ir.DataType.FLOAT))
    return g("Mul", total, g("Mul", scale, weight_scale))


def _token_codes_then_integers(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    codes, scale = _codes_per_token(g, x)
    zero = g.initializer("input_zero_point", np.array(128, np.uint8))
    offset = g.initializer("input_offset", np.array(128, np.float32))
    return _integer_product(
        g, module, g("Cast", g("Add", codes, offset), to=int(ir.DataType.UINT8)), zero, scale
    )


def _tensor_codes_then_integers(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    codes, scale, zero = g.several("DynamicQuantizeLinear", x, outputs=3)
    return _integer_product(g, module, codes, zero, scale)


def _static_codes_then_integers(g: Graph, module: CodedLinear, x: ir.Value) -> ir.Value:
    codes, scale, zero = static_codes(g, module.input_quantizer, x)
    return _integer_product(g, module, codes, zero, scale)


def output(g: Graph, quantizer: FakeQuantizer, x: ir.Value) -> ir.Value:
    """Behind a module whose output is quantized: its codes, and what they stand for."""
    codes, scale, zero = static_codes(g, quantizer, x, "output")
    return g("Mul", centred(g, codes, zero), scale)


def centred(g: Graph, codes: ir.Value, zero: ir.Value) -> ir.Value:
    """Codes less their zero point, as floats: exact."""
    return g("Sub", *(g("Cast", value, to=int(ir.DataType.FLOAT)) for value in (codes, zero)))


def static_codes(
    g: Graph, quantizer: nn.Module, x: ir.Value, what: str = "input"
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes in uint8, scale and zero point of a static or learned lattice; signed codes lie around 128."""
    assert isinstance(quantizer, FakeQuantizer)
    qparams = quantizer.stored_qparams
    offset = 128 if quantizer.spec.format.lo else 0
    zero_point = 0 if qparams.zero_point is None else int(qparams.zero_point)
    scale = g.initializer(f"{what}_scale", np.array(float(qparams.scale.detach()), np.float32))
    zero = g.initializer(f"{what}_zero_point", np.array(zero_point + offset, np.uint8))
    return g("QuantizeLinear", x, scale, zero), scale, zero


def _codes_per_token(g: Graph, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Int8 codes, as floats, and scales of every token: amax / 127, or 1 for a token of zeros."""
    axis = g.initializer("input_axis", np.array([-1], np.int64))
    amax = g("ReduceMax", g("Abs", x), axis, keepdims=1)
    scale = g("Div", amax, g.initializer("input_hi", np.array(127, np.float32)))
    zero = g.initializer("input_zero", np.array(0, np.float32))
    one = g.initializer("input_one", np.array(1, np.float32))
    scale = g("Where", g("Equal", scale, zero), one, scale)
    return g("Round", g("Div", x, scale)), scale


_blocks_in_the_kernel = _matmul_nbits(4)

_LINEAR: dict[tuple[str, str], LinearNodes] = {
    ("groups", "in float"): _matmul_nbits(1),
    ("groups", "in the weights' blocks"): _blocks_in_the_kernel,
    ("groups", "per token"): _token_codes_then_nbits,
    ("groups", "in 8-bit floats"): _float_codes_then_nbits,
    ("channels", "in float"): _dequantized_weight,
    ("floats", "in float"): onnx_qdq.linear,
    ("floats", "in 8-bit floats"): onnx_qdq.linear,
    ("channels", "per token"): _token_codes_then_integers,
    ("channels", "per tensor"): _tensor_codes_then_integers,
    ("channels", "per tensor, static"): _static_codes_then_integers,
}


class _Packed(NamedTuple):
    """A weight in groups as the com.microsoft operators store it: rows of bytes, the first code lowest."""

    bits: int
    group: int
    codes: Array  # uint8 (rows, columns * bits / 8)
    scale: Array  # float32 (rows, columns / group)
    zero_point: Array | None  # uint8 (rows, ceil(columns / group * bits / 8)); absent it is 2^(bits - 1)

    @property
    def blocks(self) -> Array:
        """The codes with an axis for the blocks of a row."""
        return self.codes.reshape(*self.scale.shape, -1)


def _pack(weight: Codes) -> _Packed:
    bits = container_bits(weight.spec.format.bits)
    offset = 2 ** (bits - 1) if weight.spec.format.lo else 0  # signed codes are stored around the middle
    group = weight.spec.granularity.columns
    assert group is not None
    zero_point = None
    if weight.zero_point is not None:
        zero_point = _pack_rows(weight.zero_point.cpu().numpy() + offset, bits)
    return _Packed(
        bits=bits,
        group=group,
        codes=_pack_rows(_codes(weight).astype(np.int16) + offset, bits),
        scale=weight.scale.cpu().numpy(),
        zero_point=zero_point,
    )


def _pack_rows(values: Array, bits: int) -> Array:
    per_byte = 8 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte))).astype(np.uint8)
    lanes = values.reshape(len(values), -1, per_byte) << (bits * np.arange(per_byte, dtype=np.uint8))
    return np.bitwise_or.reduce(lanes, axis=2)


def _codes(weight: Codes) -> Array:
    return weight.codes.cpu().numpy()
