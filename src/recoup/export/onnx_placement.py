"""Where TensorRT wants QuantizeLinear and DequantizeLinear, as a list that is checked, node by node.

Numbers are those of the recommendations in NVIDIA's "Explicit Quantization", section "Q/DQ Layer-Placement
Recommendations", and its "Q/DQ Limitations":
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html
The ranges and zero points are those of its "Quantization Schemes". A file that breaks a rule still computes
what was trained; the node then runs in floats, or in a kernel of its own.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from recoup.export.onnx import SCOPES

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
WEIGHTED = _CONVOLUTIONS | {"Gemm", "MatMul"}
# Rounding before them or after is the same, so TensorRT moves a QuantizeLinear through.
COMMUTING = frozenset(
    {"MaxPool", "GlobalMaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
    | {"Slice", "Split", "Concat", "Expand", "Gather", "DepthToSpace", "SpaceToDepth"}
)
_VIEWS = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Pad"})
_WEIGHT_TYPES = frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"})
_INPUT_TYPES = _WEIGHT_TYPES - {"INT4"}


class Wires:
    """A graph by its values: who makes them, who reads them, which are stored."""

    def __init__(self, file: onnx.ModelProto) -> None:
        self.nodes = list(file.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.stored = {tensor.name: tensor for tensor in file.graph.initializer}

    def maker(self, name: str, through: frozenset[str] = frozenset()) -> onnx.NodeProto | None:
        """The node that computes a value, behind nodes that only hand on their first input."""
        node = self.makers.get(name)
        while node is not None and node.op_type in through:
            node = self.makers.get(node.input[0])
        return node

    def codes(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The DequantizeLinear of a weighted node's stored codes; None where its weight is no codes."""
        for name in node.input[1:2]:
            made = self.maker(name, _VIEWS)
            if made is not None and made.op_type == "DequantizeLinear" and made.input[0] in self.stored:
                return made
        return None

    def module(self, node: onnx.NodeProto) -> str:
        """As in " of stem.0": a node's module, by the names of its stored tensors; nothing without any."""
        codes = self.codes(node) if node.op_type in WEIGHTED else None
        names = [codes.input[0]] if codes is not None else node.input
        path = next((name.rpartition(".")[0] for name in names if name in self.stored), "")
        return f" of {path}" if path else ""

    def scopes(self, node: onnx.NodeProto) -> list[str]:
        """The modules around a node, the largest first: of a lowered one by its tensors, else as traced."""
        module = self.module(node).removeprefix(" of ").split(".")
        if module != [""]:
            return [".".join(module[:end]) for end in range(1, len(module) + 1)]
        traced = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
        return [scope for scope in ast.literal_eval(traced)[:-1] if scope]

    def weighted(self) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
        """Every node that multiplies by stored codes, with their DequantizeLinear."""
        for node in self.nodes:
            codes = self.codes(node) if node.op_type in WEIGHTED else None
            if codes is not None:
                yield node, codes

    def value(self, name: str) -> Any:
        """A stored tensor as NumPy's; None for a computed one."""
        return numpy_helper.to_array(self.stored[name]) if name in self.stored else None

    def type_of(self, name: str) -> str:
        """The type of a stored tensor, as ONNX calls it."""
        return onnx.TensorProto.DataType.Name(self.stored[name].data_type)


@dataclass(frozen=True)
class Rule:
    """One rule: what it says, from where, and how to find the nodes that break it.

    Args:
        says: the rule, with what happens otherwise.
        source: the number of the recommendation, or the section.
        broken: the nodes, each with what was found.
    """

    says: str
    source: str
    broken: Callable[[Wires], Iterator[tuple[onnx.NodeProto, str]]]


def _float_inputs(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in wires.nodes:
        if node.op_type not in WEIGHTED:
            continue
        if wires.codes(node) is None:
            name = node.input[1]
            what = f"{name} is in float" if name in wires.stored else "both inputs are computed"
            yield node, what
            continue
        made = wires.maker(node.input[0], _VIEWS)
        if made is None or made.op_type != "DequantizeLinear":
            source = made.op_type if made is not None else "the graph's input"
            yield node, f"its input comes from {source}, not from a DequantizeLinear"


def _batch_norms(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    products = {id(node) for node, _ in wires.weighted()}
    for node in wires.nodes:
        if node.op_type == "BatchNormalization" and id(wires.maker(node.input[0])) in products:
            yield node, "it stands behind stored codes; call recoup.transforms.fuse before prepare"


def _residuals(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    products = {id(node) for node, _ in wires.weighted()}
    for node in wires.nodes:
        if node.op_type != "Add" or not _is_quantized_later(wires, node.output[0]):
            continue
        makers = [wires.maker(name) for name in node.input]
        first = next((made for made in makers if id(made) in products and made is not None), None)
        if first is not None and not any(made and made.op_type == "DequantizeLinear" for made in makers):
            if any(name in wires.stored for name in node.input):
                continue  # a bias
            makers = [made for made in makers if id(made) not in products] or makers
            names = [name for made in makers if made is not None and (name := _outside(wires, made, node))]
            remedy = (
                f"write outputs: [{' or '.join(names)}]"
                if names
                else "make the residual a module's output, as nn.ReLU or nn.Identity, and name it in outputs"
            )
            what = f"no DequantizeLinear before it, so {first.name or first.output[0]} writes floats"
            yield node, f"{what}; {remedy}"


def _outside(wires: Wires, made: onnx.NodeProto, node: onnx.NodeProto) -> str | None:
    """The largest module that has the first node in it and not the second; None where there is none."""
    around = [f"{scope}." for scope in wires.scopes(node)]
    scopes = (f"{scope}." for scope in wires.scopes(made))
    return next((s[:-1] for s in scopes if not any(other.startswith(s) for other in around)), None)


def _is_quantized_later(wires: Wires, name: str) -> bool:
    readers = wires.readers.get(name, [])
    through = COMMUTING | {"Relu", "Clip", "LeakyRelu"}
    return any(
        node.op_type == "QuantizeLinear"
        or (node.op_type in through and _is_quantized_later(wires, node.output[0]))
        for node in readers
    )


def _other_inputs(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in wires.nodes:
        if node.op_type == "DynamicQuantizeLinear":
            yield node, "TensorRT quantizes as it runs only in blocks, to E4M3 and E2M1"
        if node.op_type != "QuantizeLinear":
            continue
        scale = wires.value(node.input[1])
        if scale is None:
            continue
        zero = wires.value(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        kind = wires.type_of(node.input[2]) if len(node.input) > 2 else "UINT8"
        if scale.size != 1:
            yield node, f"it has {scale.size} scales"
        elif np.any(zero.astype(np.float32) != 0):
            yield node, f"its zero point is {zero.item()}"
        elif kind not in _INPUT_TYPES:
            yield node, f"its codes are {kind}"


def _other_weights(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node, codes in wires.weighted():
        attributes = {attribute.name: attribute.i for attribute in codes.attribute}
        zero = wires.value(codes.input[2]) if len(codes.input) > 2 else np.zeros(1)
        kind = wires.type_of(codes.input[0])
        if kind not in _WEIGHT_TYPES:
            yield node, f"its codes are {kind}"
        elif zero is None or np.any(zero.astype(np.float32) != 0):
            yield node, "its weight has zero points"
        elif "block_size" in attributes and (node.op_type in _CONVOLUTIONS or kind == "INT8"):
            yield node, f"its {kind} weight has a scale for every {attributes['block_size']} columns"
        elif node.op_type == "ConvTranspose" and codes.output[0] != node.input[1]:
            yield node, "its weight is put into groups behind its DequantizeLinear"


def _quantized_biases(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node, _ in wires.weighted():
        for name in node.input[2:3]:
            if name in wires.makers:
                yield node, f"its bias comes from {wires.makers[name].op_type}"


def _parted_scales(wires: Wires) -> Iterator[tuple[onnx.NodeProto, str]]:
    for group in shared(wires):
        scales = sorted({float(wires.value(node.input[1])) for node in group})
        if len(scales) > 1:
            for node in group:
                yield (
                    node,
                    f"what it rounds is rounded with {len(scales)} scales, {scales[0]:g} to {scales[-1]:g}",
                )


def shared(wires: Wires) -> list[list[onnx.NodeProto]]:
    """The QuantizeLinear nodes with a stored scale that round one tensor, or a tensor and views of it.

    Views are what a QuantizeLinear commutes with: a Concat's output is a view of every input.
    """
    pairs = [
        node for node in wires.nodes if node.op_type == "QuantizeLinear" and node.input[1] in wires.stored
    ]
    roots = {id(node): _roots(wires, node.input[0]) for node in pairs}
    groups = [{id(node)} for node in pairs]
    for one, other in combinations(pairs, 2):
        if roots[id(one)] & roots[id(other)]:
            first = next(group for group in groups if id(one) in group)
            second = next(group for group in groups if id(other) in group)
            if first is not second:
                groups.remove(second)
                first |= second
    return [[node for node in pairs if id(node) in group] for group in groups if len(group) > 1]


def _roots(wires: Wires, name: str) -> set[str]:
    node = wires.makers.get(name)
    if node is not None and node.op_type == "DequantizeLinear" and node.input[0] in wires.makers:
        return _roots(wires, wires.makers[node.input[0]].input[0])  # of a pair: what it rounds
    if node is None or node.op_type not in COMMUTING:
        return {name}
    sources = node.input if node.op_type == "Concat" else node.input[:1]
    return {root for source in sources for root in _roots(wires, source)}


RULES: Mapping[str, Rule] = {
    "inputs": Rule(
        "all inputs of weighted operations are quantized, or the product is of floats",
        "recommendation 1",
        _float_inputs,
    ),
    "batch-norm": Rule(
        "batch norms are folded before codes are chosen, or they run by themselves",
        "recommendation 3",
        _batch_norms,
    ),
    "residual": Rule(
        "the residual input of a sum is quantized, or the fused convolution writes floats",
        "recommendation 4",
        _residuals,
    ),
    "activations": Rule(
        "activations have one scale and zero point 0, in INT8 or E4M3, or no kernel takes them",
        "recommendation 7; Quantization Schemes",
        _other_inputs,
    ),
    "weights": Rule(
        "weights are symmetric; INT8 and E4M3 have a scale per channel or tensor, or no kernel takes them",
        "recommendation 7; Quantization Schemes",
        _other_weights,
    ),
    "bias": Rule("biases stay in float, or they are rounded again", "recommendation 1", _quantized_biases),
    "shared-scale": Rule(
        "a tensor and its views (concat, max pool, reshape) have one scale, or each is rounded by itself",
        "Q/DQ Limitations",
        _parted_scales,
    ),
}


def violations(file: onnx.ModelProto) -> dict[str, str]:
    """By node, the rules that it breaks: what was found, and what follows.

    Args:
        file: a graph; stored tensors may be missing but for scales and zero points.

    Returns:
        Nothing for a file that TensorRT fuses as far as its rules tell.
    """
    wires, found = Wires(file), dict[str, list[str]]()
    for name, rule in RULES.items():
        for node, what in rule.broken(wires):
            line = f"{node.op_type}{wires.module(node)}: {what} ({name}: {rule.says}; {rule.source})"
            found.setdefault(node.name or node.output[0], []).append(line)
    return {node: " | ".join(lines) for node, lines in found.items()}
