"""The nodes of a convolution on the trained lattice, under onnxruntime's default session options.

    weights        inputs                  nodes
    per channel    float                   Conv, or ConvTranspose
    per channel    (u)int8, static         the input's codes in QuantizeLinear, then Conv on them as floats
    per channel    uint8, per tensor       the same with DynamicQuantizeLinear
    8-bit floats   float, or the same      see onnx_qdq.py; nothing there is fused

The weight is stored as int8 codes and scales; a transposed convolution's as it was trained, a row for every
output channel, and Reshape and Transpose put it back. Cast and Mul make it float once, when a session opens.
The sum of products is then float32 with the bias that training had, so the module's bound is that of a linear
layer.
No DequantizeLinear stands beside the Conv, because onnxruntime would fuse one: QLinearConv rounds the bias to
int32 at the product of the scales, which is no step of training and overflows in channels of small weights;
and where a DequantizeLinear leads to a Conv with float weights, a session quantizes those anew, per tensor.
See docs/decisions/0010.
"""

import onnx_ir as ir

from recoup.export import onnx_qdq
from recoup.export.onnx_graph import Graph
from recoup.export.onnx_layouts import input_layout, weight_layout
from recoup.export.onnx_nodes import centred, static_codes
from recoup.nn import CodedConv, CodedConvTranspose


def conv(g: Graph, module: CodedConv, x: ir.Value) -> ir.Value:
    """The nodes of a convolution, from its input to its output."""
    if weight_layout(module.weight.spec) == "floats":
        return onnx_qdq.conv(g, module, x)
    transposed = isinstance(module, CodedConvTranspose)
    kernel = () if transposed else module.kernel_size
    stored = module.weight.codes.cpu().numpy().reshape(module.out_channels, -1, *kernel)
    weight = g("Cast", g.initializer("codes", stored), to=int(ir.DataType.FLOAT))
    scale = g.initializer("scale", module.weight.scale.cpu().numpy().reshape(-1, *[1] * (1 + len(kernel))))
    match input_layout(module.scheme):
        case "per tensor, static":
            codes, input_scale, zero = static_codes(g, module.input_quantizer, x)
            x, scale = centred(g, codes, zero), g("Mul", scale, input_scale)
        case "per tensor":
            codes, input_scale, zero = g.several("DynamicQuantizeLinear", x, outputs=3)
            x = g("Mul", centred(g, codes, zero), input_scale)
        case _:
            pass
    weight = g("Mul", weight, scale)
    return onnx_qdq.convolved(g, module, x, onnx_qdq.put_back(g, module, weight) if transposed else weight)
