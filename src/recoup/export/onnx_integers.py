"""What onnxruntime computes in integers, from codes to codes: QLinearConv and QLinearAdd.

    codes -> Conv of floats -> [Relu, Clip] -> QuantizeLinear -> codes      as it is lowered
    codes -> QLinearConv -> codes                                           what it becomes here

    codes, codes -> floats -> Add -> [Relu, Clip] -> QuantizeLinear -> codes
    codes, codes -> QLinearAdd -> codes

    codes -> floats -> [MaxPool, Reshape, ...] -> QuantizeLinear on the same lattice -> codes
    codes -> [MaxPool, Reshape, ...] -> codes

A convolution becomes one if codes of one lattice are all that is made of its output, if its bias is an int32
(`Scheme.integer_bias`: so training saw it), if no kernel of x86 saturates, and if the activation between does
nothing that the lattice does not do: codes with zero point 0 end at 0, as a Relu does. A sum becomes one
where the recipe quantizes both tensors and what is made of them (`outputs`). Modules that are called more
than once stay as they are.

The kernels add in int32, exactly, and scale the sum once; so their codes are the trained ones, but for sums
that lie within rounding error of a tie. See docs/decisions/0025.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from recoup.export.onnx import ADDED, AGAIN, INPUT, LATTICE_OF, RESULT
from recoup.export.onnx_graph import MICROSOFT, Graph
from recoup.export.onnx_layouts import fits_sixteen_bits
from recoup.nn import OUTPUT, CodedConv, CodedConvTranspose, FakeQuantizer

_ACTIVATIONS = ("Relu", "Clip")
# They hand on values of what they read and make no others, so it does not matter whether these are codes.
_HAND_ON = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")
_ATTRIBUTES = ("kernel_shape", "strides", "dilations", "group", "pads")
_HIGHEST = 255

Values = dict[str, dict[str, str]]


def compute_in_integers(model: ir.Model, coded: Mapping[str, Any], values: Values) -> None:
    """Let what can stay in codes stay in codes; in place, in `values` too.

    Args:
        model: the whole file.
        coded: converted modules and quantizers of outputs, by path.
        values: the input and the output of every call of them; see `onnx.write`.
    """
    calls = Counter(called.partition(AGAIN)[0] for called in values)
    once = {path: module for path, module in coded.items() if calls[path] == 1}
    graph, rewriting = model.graph, _Rewriting(model.graph, once, values)
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        rewriting.round_once(quantize)
    for path, module in once.items():
        if (
            isinstance(module, CodedConv)
            and not isinstance(module, CodedConvTranspose)
            and module.scheme.integer_bias
            and fits_sixteen_bits(module.weight.spec)
        ):
            rewriting.convolution(path, module)
    for node in [node for node in graph if node.op_type == "Add"]:
        rewriting.sum(node)
    as_floats = dict(rewriting.outputs_as_floats())
    RemoveUnusedNodesPass()(model)
    left = {value.name for node in graph for value in node.outputs}
    for path, codes in as_floats.items():
        if values[path][RESULT] not in left:  # the proof reads what others read
            values[path] |= {RESULT: str(codes.value.name), RESULT + LATTICE_OF: path}


class _Codes(NamedTuple):
    """A tensor in codes, with the lattice that they are on: `path` has it, see `onnx_parity`."""

    value: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    path: str


class _Rewriting:
    def __init__(self, graph: ir.Graph, once: Mapping[str, Any], values: Values) -> None:
        self.graph, self.once, self.values = graph, once, values
        self.lattices = {name: path for path, module in once.items() for name in _scales_of(path, module)}

    def round_once(self, quantize: ir.Node) -> None:
        """What comes from codes of the same lattice has these codes already."""
        handing, x = list[ir.Node](), quantize.inputs[0]
        while x is not None and (node := x.producer()) is not None and node.op_type in _HAND_ON:
            handing.append(node)
            x = node.inputs[0]
        path, codes = self._path_of(quantize), self._decoded(x)
        if path is None or codes is None or not _equal((codes.scale, codes.zero_point), quantize.inputs[1:3]):
            return
        for node in reversed(handing):
            codes = codes._replace(value=self._of_codes(node, codes.value))
        self._replace([quantize], codes)

    def convolution(self, path: str, module: CodedConv) -> None:
        """QLinearConv, where it computes what stands there."""
        graph = self.graph
        node = self._maker(self.values[path][RESULT])
        codes, quantizes = _centred(node.inputs[0]), self._quantizes(node.outputs[0])
        if codes is None or not quantizes:
            return
        graph.initializers.pop(f"{path}.scale")  # in the shape of the other form
        graph.initializers.pop(f"{path}.bias", None)
        nodes = Graph(path, graph.initializers, path, tied=False)
        biases = module.bias_codes
        made = nodes(
            "QLinearConv",
            codes,
            graph.initializers[f"{path}.input_scale"],
            graph.initializers[f"{path}.input_zero_point"],
            graph.initializers[f"{path}.codes"],
            nodes.initializer("scale", module.weight.scale.numpy().reshape(-1)),
            nodes.initializer("zero_point", np.zeros(module.out_channels, np.int8)),
            *quantizes[0].inputs[1:3],
            *(() if biases is None else (nodes.initializer("bias", biases.numpy()),)),
            **{name: node.attributes[name].value for name in _ATTRIBUTES},
        )
        made.name = f"{path}.output_codes"
        found = self._insert(node, nodes, made, quantizes)
        self.values[path] |= {RESULT: made.name, RESULT + LATTICE_OF: found.path}

    def sum(self, node: ir.Node) -> None:
        """QLinearAdd, where a recipe quantizes what goes in and what comes out."""
        one, other = (self._decoded(value) for value in node.inputs)
        quantizes = self._quantizes(node.outputs[0])
        if one is None or other is None or not quantizes:
            return
        path = self._path_of(quantizes[0])
        if path is None or not path.endswith(f".{OUTPUT}"):
            return  # nobody would prove it
        nodes = Graph(path, self.graph.initializers, path, tied=False)
        made = nodes("QLinearAdd", *one[:3], *other[:3], *quantizes[0].inputs[1:3], domain=MICROSOFT)
        made.name = f"{path.removesuffix(f'.{OUTPUT}')}.output_codes"
        self._insert(node, nodes, made, quantizes)
        self.values[path] |= {
            INPUT: str(one.value.name),
            INPUT + LATTICE_OF: one.path,
            ADDED: str(other.value.name),
            ADDED + LATTICE_OF: other.path,
        }

    def outputs_as_floats(self) -> Iterator[tuple[str, _Codes]]:
        """The quantized outputs that are there as floats, with the codes behind them."""
        for path, module in self.once.items():
            if isinstance(module, FakeQuantizer):
                codes = self._decoded(self._maker(self.values[path][RESULT]).outputs[0])
                if codes is not None:
                    yield path, codes

    def _of_codes(self, node: ir.Node, codes: ir.Value) -> ir.Value:
        """What a node that hands on values makes of codes."""
        for other in codes.consumers():
            if other.name == f"{node.name}_codes":  # made for another reader
                return other.outputs[0]
        inputs = [codes, *node.inputs[1:]]
        copy = ir.Node("", node.op_type, inputs, node.attributes.values(), name=f"{node.name}_codes")
        made = copy.outputs[0]
        made.name = f"{node.outputs[0].name}_codes"
        made.dtype, made.shape = ir.DataType.UINT8, node.outputs[0].shape
        self.graph.insert_after(node, copy)
        return made

    def _insert(self, node: ir.Node, nodes: Graph, made: ir.Value, quantizes: list[ir.Node]) -> _Codes:
        """Put a node that makes codes beside the one that made floats, and let everybody read it."""
        made.dtype, made.shape = ir.DataType.UINT8, node.outputs[0].shape
        for value in nodes.tape.initializers:
            self.graph.register_initializer(value)
        self.graph.insert_after(node, list(nodes.tape.nodes))
        path = self._path_of(quantizes[0])
        scale, zero_point = quantizes[0].inputs[1:3]
        assert path is not None
        assert scale is not None
        assert zero_point is not None
        codes = _Codes(made, scale, zero_point, path)
        self._replace(quantizes, codes)
        return codes

    def _replace(self, quantizes: list[ir.Node], codes: _Codes) -> None:
        """These codes stand for what the nodes made."""
        for quantize in quantizes:
            old, path = quantize.outputs[0], self._path_of(quantize)
            assert path is not None
            old.replace_all_uses_with(codes.value)
            for entry in self.values.values():
                for end in (INPUT, ADDED, RESULT):
                    if entry.get(end) == old.name:
                        entry[end] = str(codes.value.name)
            self.values[path] |= {INPUT: str(codes.value.name), INPUT + LATTICE_OF: codes.path}

    def _quantizes(self, output: ir.Value) -> list[ir.Node]:
        """All that is made of an output, if they are codes of one lattice that does what activations do."""
        activations: list[ir.Node] = []
        while len(output.consumers()) == 1 and output.consumers()[0].op_type in _ACTIVATIONS:
            activations.append(output.consumers()[0])
            output = activations[-1].outputs[0]
        found = list(output.consumers())
        if output.is_graph_output() or not all(self._path_of(node) is not None for node in found):
            return []
        lattices = list(self._lattices(found))
        if not all(_equal(found[0].inputs[1:3], node.inputs[1:3]) for node in found[1:]):
            return []
        return found if all(_does(lattices[0], activation) for activation in activations) else []

    def _lattices(self, quantizes: list[ir.Node]) -> Iterator[FakeQuantizer]:
        for node in quantizes:
            module = self.once[str(self._path_of(node))]
            yield module if isinstance(module, FakeQuantizer) else module.input_quantizer

    def _path_of(self, node: ir.Node) -> str | None:
        """Whose lattice a QuantizeLinear has: a module's for its input, or a quantizer's of an output."""
        scale = node.inputs[1] if node.op_type == "QuantizeLinear" else None
        return None if scale is None else self.lattices.get(str(scale.name))

    def _decoded(self, x: ir.Value | None) -> _Codes | None:
        """The codes that stand behind floats; None where there are none."""
        multiply = None if x is None else x.producer()
        if multiply is None or multiply.op_type != "Mul":
            return None
        codes, scale = _centred(multiply.inputs[0]), multiply.inputs[1]
        path = None if scale is None else self.lattices.get(str(scale.name))
        if codes is None or scale is None or path is None:
            return None
        zero_point = self.graph.initializers[f"{str(scale.name).removesuffix('scale')}zero_point"]
        return _Codes(codes, scale, zero_point, path)

    def _maker(self, name: str) -> ir.Node:
        return next(node for node in self.graph for value in node.outputs if value.name == name)


def _scales_of(path: str, module: Any) -> list[str]:
    """The names of the scales of a module's input, or of an output."""
    if isinstance(module, FakeQuantizer):
        return [f"{path.removesuffix(f'.{OUTPUT}')}.output_scale"]
    return [f"{path}.input_scale"]


def _centred(x: ir.Value | None) -> ir.Value | None:
    """The codes that floats are, less their zero point; None where they are something else."""
    subtract = None if x is None else x.producer()
    if subtract is None or subtract.op_type != "Sub" or subtract.inputs[0] is None:
        return None
    cast = subtract.inputs[0].producer()
    return cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None


def _equal(one: Any, other: Any) -> bool:
    """Scales and zero points, as they are stored."""
    return all(
        np.array_equal(a.const_value.numpy(), b.const_value.numpy()) for a, b in zip(one, other, strict=True)
    )


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
