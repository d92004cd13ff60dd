"""Which products of a file are no products of codes, by node, and what they are instead."""

from collections.abc import Mapping

import onnx

# Operators that sum products, for which some engine or other has a form with codes.
_PRODUCTS = {
    *("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention", "LSTM", "GRU", "RNN"),
    *("MatMulNBits", "FusedMatMul"),
}
_CARRIERS = {"Transpose", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Mul", "DequantizeLinear", "Gather"}


def in_float(file: onnx.ModelProto) -> dict[str, str]:
    """Every node that multiplies floats: what it falls back to, and why.

    Products in MatMulInteger, or in MatMulNBits with int8 inputs, are of codes and do not stand here. Nodes
    have the names that they have in the file.
    """
    makers = {name: node for node in file.graph.node for name in node.output}
    stored = {
        tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in file.graph.initializer
    }
    return {
        node.name or node.output[0]: f"{node.op_type} {reason}"
        for node in file.graph.node
        if node.op_type in _PRODUCTS and (reason := _reason(node, makers, stored))
    }


def _reason(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], stored: Mapping[str, str]
) -> str | None:
    sources = [_source(name, makers, stored) for name in node.input if name]
    weights = [name for name in sources if name in stored and not name.endswith(".bias")]
    if node.op_type == "MatMulNBits":
        if next((a.i for a in node.attribute if a.name == "accuracy_level"), 0) == 4:
            return None
        return f"of {_module(node.input[1])}: codes are made float in the kernel, inputs are float32"
    if not weights:
        return "of two computed tensors: float32, no module of the recipe holds it"
    codes = next((name for name in weights if name.endswith(".codes")), None)
    if codes is None:
        return f"with {weights[-1]}: float32, as the recipe keeps it"
    return f"of {_module(codes)}: float32 sums, codes are made float before"


def _module(codes: str) -> str:
    return codes.removesuffix(".codes")


def _source(name: str, makers: Mapping[str, onnx.NodeProto], stored: Mapping[str, str]) -> str:
    """The initializer, input or result that a value is only another view of; a Mul, if by stored scales."""
    while name in makers and makers[name].op_type in _CARRIERS:
        node = makers[name]
        if node.op_type == "Mul" and _source(node.input[1], makers, stored) not in stored:
            break
        name = node.input[0]
    return name
