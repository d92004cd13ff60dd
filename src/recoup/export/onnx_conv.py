"""The nodes of a convolution on the trained lattice, under onnxruntime's default session options.

    weights        inputs                  nodes
    per channel    float                   Conv
    per channel    (u)int8, static         the input's codes in QuantizeLinear, then Conv on them as floats
    per channel    uint8, per tensor       the same with DynamicQuantizeLinear

The weight is stored as int8 codes and scales. Cast and Mul make it float once, when a session opens. The sum
of products is then float32 with the bias that training had, so the module's bound is that of a linear layer.
No DequantizeLinear stands beside the Conv, because onnxruntime would fuse one: QLinearConv rounds the bias to
int32 at the product of the scales, which is no step of training and overflows in channels of small weights;
and where a DequantizeLinear leads to a Conv with float weights, a session quantizes those anew, per tensor.
See docs/decisions/0010.
"""

import numpy as np
import onnx_ir as ir

from recoup.export.onnx_nodes import Graph, input_layout, static_codes
from recoup.nn import CodedConv

_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def conv(g: Graph, module: CodedConv, x: ir.Value) -> ir.Value:
    """The nodes of a convolution, from its input to its output."""
    dimensions = len(module.kernel_size)
    stored = module.weight.codes.cpu().numpy().reshape(module.out_channels, -1, *module.kernel_size)
    weight = g("Cast", g.initializer("codes", stored), to=int(ir.DataType.FLOAT))
    scale = g.initializer("scale", module.weight.scale.cpu().numpy().reshape(-1, *[1] * (1 + dimensions)))
    match input_layout(module.scheme):
        case "per tensor, static":
            codes, input_scale, zero = static_codes(g, module.input_quantizer, x)
            x, scale = _centred(g, codes, zero), g("Mul", scale, input_scale)
        case "per tensor":
            codes, input_scale, zero = g.several("DynamicQuantizeLinear", x, outputs=3)
            x = g("Mul", _centred(g, codes, zero), input_scale)
        case _:
            pass
    # F.pad takes the last axis first, ONNX all beginnings and then all ends
    begins, ends = (list(module.edges[side::2])[::-1] for side in (0, 1))
    pads = [*begins, *ends]
    if module.padding_mode != "zeros":
        everywhere = np.array(
            [0, 0, *begins, 0, 0, *ends], np.int64
        )  # batch and channels are axes of Pad too
        x = g("Pad", x, g.initializer("pads", everywhere), mode=_PAD_MODES[module.padding_mode])
        pads = [0] * len(pads)
    bias = module.bias
    return g(
        "Conv",
        x,
        g("Mul", weight, scale),
        *([] if bias is None else [g.initializer("bias", bias.detach().float().cpu().numpy())]),
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        dilations=list(module.dilation),
        group=module.groups,
        pads=pads,
    )


def _centred(g: Graph, codes: ir.Value, zero: ir.Value) -> ir.Value:
    """Codes less their zero point, as floats: exact."""
    return g("Sub", *(g("Cast", value, to=int(ir.DataType.FLOAT)) for value in (codes, zero)))
