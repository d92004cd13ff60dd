"""Convolutions that onnxruntime computes in integers, from codes to codes: QLinearConv.

    codes -> Conv on floats -> [Relu, Clip] -> QuantizeLinear -> codes      as `onnx_conv` writes it
    codes -> QLinearConv -> codes                                           what it becomes here

That is if codes of one lattice are all that is made of a convolution's output, if its bias is an int32
(`Scheme.integer_bias`: so training saw it), if no kernel of x86 saturates, if the activation between does
nothing that the lattice does not do (codes with zero point 0 end at 0, as a Relu does), and if the model
calls it once. The kernel adds products and bias in int32, exactly, and scales the sum once. So its codes are
the trained ones, but for sums that lie within rounding error of a tie. See docs/decisions/0025.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from recoup.export.onnx import AGAIN
from recoup.export.onnx_graph import Graph
from recoup.export.onnx_nodes import fits_sixteen_bits
from recoup.nn import CodedConv, FakeQuantizer

ROUNDED_AS = "rounded as"  # in `values`: the module whose input lattice the output lies on
_ACTIVATIONS = ("Relu", "Clip")
_HIGHEST = 255

Values = dict[str, dict[str, str]]


def compute_in_integers(model: ir.Model, coded: Mapping[str, Any], values: Values) -> None:
    """Put QLinearConv where it computes what stands there; in place, in `values` too.

    Args:
        model: the whole file.
        coded: converted modules, by path.
        values: the input and the output of every call of them; see `onnx.write`.
    """
    calls = Counter(called.partition(AGAIN)[0] for called in values)
    once = {path: module for path, module in coded.items() if calls[path] == 1}
    for path, module in once.items():
        if not (isinstance(module, CodedConv) and module.scheme.integer_bias):
            continue
        node = next(
            node for node in model.graph for value in node.outputs if value.name == values[path]["output"]
        )
        if fits_sixteen_bits(module.weight.spec):
            _convolution(model.graph, path, node, once, values)
    RemoveUnusedNodesPass()(model)


def _convolution(graph: ir.Graph, path: str, node: ir.Node, coded: Mapping[str, Any], values: Values) -> None:
    codes, quantizes = _codes_of(node.inputs[0]), _quantizes(node.outputs[0], coded)
    if codes is None or not quantizes:
        return
    module, old = coded[path], quantizes[0]
    graph.initializers.pop(f"{path}.scale")  # in the shape of the other form
    graph.initializers.pop(f"{path}.bias", None)
    nodes = Graph(path, graph.initializers, path, tied=False)
    biases = module.bias_codes
    bias = () if biases is None else (nodes.initializer("bias", biases.numpy()),)
    new = nodes(
        "QLinearConv",
        codes,
        graph.initializers[f"{path}.input_scale"],
        graph.initializers[f"{path}.input_zero_point"],
        graph.initializers[f"{path}.codes"],
        nodes.initializer("scale", module.weight.scale.numpy().reshape(-1)),
        nodes.initializer("zero_point", np.zeros(module.out_channels, np.int8)),
        old.inputs[1],
        old.inputs[2],
        *bias,
        **{name: node.attributes[name].value for name in _ATTRIBUTES},
    )
    new.name = f"{path}.output_codes"
    new.dtype, new.shape = ir.DataType.UINT8, node.outputs[0].shape
    for value in nodes.tape.initializers:
        graph.register_initializer(value)
    graph.insert_after(node, list(nodes.tape.nodes))
    values[path] = values[path] | {"output": new.name, ROUNDED_AS: _path_of(old)}
    for quantize in quantizes:
        quantize.outputs[0].replace_all_uses_with(new)
        values[_path_of(quantize)]["input"] = new.name


_ATTRIBUTES = ("kernel_shape", "strides", "dilations", "group", "pads")


def _codes_of(x: ir.Value | None) -> ir.Value | None:
    """The codes that a convolution's input is, less their zero point; None where it is something else."""
    subtract = None if x is None else x.producer()
    if subtract is None or subtract.op_type != "Sub" or subtract.inputs[0] is None:
        return None
    cast = subtract.inputs[0].producer()
    return cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None


def _quantizes(output: ir.Value, coded: Mapping[str, Any]) -> list[ir.Node]:
    """All that is made of an output, if they are codes of one lattice that does what activations do."""
    activations: list[ir.Node] = []
    while len(output.consumers()) == 1 and output.consumers()[0].op_type in _ACTIVATIONS:
        activations.append(output.consumers()[0])
        output = activations[-1].outputs[0]
    found = list(output.consumers())
    if output.is_graph_output() or not all(node.op_type == "QuantizeLinear" for node in found):
        return []
    if not all(_path_of(node) in coded for node in found):
        return []
    lattices = [coded[_path_of(node)].input_quantizer for node in found]
    if not all(_same(lattices[0], lattice) for lattice in lattices[1:]):
        return []
    return found if all(_does(lattices[0], activation) for activation in activations) else []


def _path_of(quantize: ir.Node) -> str:
    scale = quantize.inputs[1]
    assert scale is not None
    return str(scale.name).removesuffix(".input_scale")


def _same(lattice: FakeQuantizer, other: FakeQuantizer) -> bool:
    one, two = lattice.stored_qparams, other.stored_qparams
    zero = [0 if qparams.zero_point is None else int(qparams.zero_point) for qparams in (one, two)]
    return lattice.spec == other.spec and bool(one.scale == two.scale) and zero[0] == zero[1]


def _does(lattice: FakeQuantizer, activation: ir.Node) -> bool:
    """The codes of whatever goes into the activation are those of what comes out of it."""
    qparams = lattice.stored_qparams
    zero_point = qparams.zero_point
    if lattice.spec.format.lo < 0 or zero_point is None or int(zero_point) != 0:
        return False
    if activation.op_type == "Relu":
        return True
    lowest, highest = (
        None if bound is None or bound.const_value is None else float(bound.const_value.numpy())
        for bound in activation.inputs[1:3]
    )
    # what is clipped to `highest` has the last code, as what lies above it has
    return lowest == 0 and highest is not None and round(highest / float(qparams.scale)) >= _HIGHEST
