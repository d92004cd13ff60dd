"""Every scheme that onnxruntime runs: the bytes hold what was trained, and the engine computes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper, utils
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from recoup.engines.onnxruntime import OnnxModel
from recoup.export import TARGETS
from recoup.nn import CodedEmbedding, CodedLinear
from recoup.numerics import IntFormat

from .conftest import (
    EMBEDDINGS,
    FEATURES,
    LINEARS,
    SCHEMES,
    WIDTH,
    WORDS,
    Exported,
    exact,
    exported,
    per_tensor_affine,
    ready,
)

U = 2.0**-24  # half an ulp of float32
PATHS = [*(f"linear.{name}" for name in LINEARS), *(f"embedding.{name}" for name in EMBEDDINGS)]
Decoded = tuple[list[list[int]], list[list[float]], list[list[int]]]


def stream(data: bytes, bits: int, count: int) -> list[int]:
    """`count` numbers of `bits` bits, the first in the lowest bits."""
    number = int.from_bytes(data, "little")
    return [number >> (bits * index) & (1 << bits) - 1 for index in range(count)]


def decoded(file: onnx.ModelProto, path: str, rows: int, columns: int) -> Decoded:
    """Codes as they are stored, scales and stored zero points of one module, from the file's bytes alone."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    node = next(node for node in file.graph.node if f"{path}.codes" in node.input)
    codes, scales = stored[f"{path}.codes"], stored[f"{path}.scale"].ravel().tolist()
    zeros = stored.get(f"{path}.zero_point")
    if codes.dtype.name.startswith("float8"):  # a code is its bit pattern, a byte
        patterns = np.frombuffer(codes.tobytes(), np.uint8).reshape(rows, columns)
        blocks = 1 if stored[f"{path}.scale"].ndim < 2 else stored[f"{path}.scale"].shape[1]
        scale = np.array(scales).reshape(-1, blocks).tolist()
        return patterns.tolist(), scale, [[0] * blocks] * rows
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        bits, blocks = attributes["bits"], columns // attributes["block_size"]
        data, wide = codes.tobytes(), columns * bits // 8
        assert len(data) == rows * wide
        found = [stream(data[row * wide : (row + 1) * wide], bits, columns) for row in range(rows)]
        scale = [scales[row * blocks : (row + 1) * blocks] for row in range(rows)]
        if zeros is None:
            return found, scale, [[1 << (bits - 1)] * blocks] * rows
        narrow = -(-blocks * bits // 8)
        data = zeros.tobytes()
        assert len(data) == rows * narrow
        return (
            found,
            scale,
            [stream(data[row * narrow : (row + 1) * narrow], bits, blocks) for row in range(rows)],
        )
    codes = codes.reshape(columns, rows)
    found = [[int(codes[column, row]) for column in range(columns)] for row in range(rows)]
    zero = 0 if zeros is None else int(zeros)
    return found, [[value] for value in scales], [[zero]] * rows


@pytest.mark.parametrize("path", PATHS)
def test_the_bytes_hold_the_codes_and_scales_of_convert(branches: Exported, path: str) -> None:
    weight = branches.converted.get_submodule(path).weight
    codes, scales, zeros = decoded(branches.file, path, *weight.codes.shape)
    trained_zeros = torch.zeros(len(weight.codes), weight.scale.shape[1], dtype=torch.int32)
    trained_zeros = trained_zeros if weight.zero_point is None else weight.zero_point
    per_block = weight.codes.shape[1] // weight.scale.shape[1]
    distance = torch.tensor(codes) - torch.tensor(zeros).repeat_interleave(per_block, 1)
    trained = weight.codes.int() - trained_zeros.int().repeat_interleave(per_block, 1)
    assert torch.equal(distance, trained.long())
    assert torch.equal(torch.tensor(scales), weight.scale)
    grid = weight.spec.format
    there_are = grid.hi - grid.lo if isinstance(grid, IntFormat) else 2 ** (grid.bits - 1)
    assert len(set(weight.codes.flatten().tolist())) > there_are / 2  # nothing degenerate was compared


def test_the_width_of_a_code_is_the_one_that_preflight_tells(branches: Exported) -> None:
    stored = {tensor.name: tensor for tensor in branches.file.graph.initializer}
    for path in PATHS:
        module = branches.converted.get_submodule(path)
        bits = TARGETS["onnx"].width(module.scheme, type(module))
        assert 8 * len(stored[f"{path}.codes"].raw_data) == bits * module.weight.codes.numel(), path


def test_every_module_is_in_the_proof(branches: Exported) -> None:
    coded = [m for m in branches.converted.modules() if isinstance(m, (CodedLinear, CodedEmbedding))]
    assert branches.parity.modules == len(coded) == len(PATHS)
    assert branches.parity.codes == sum(module.weight.codes.numel() for module in coded)
    assert branches.parity.scales == sum(module.weight.scale.numel() for module in coded)
    assert 0 < branches.parity.worst_module <= 1
    assert json.loads((branches.folder / "parity.json").read_text()) == branches.parity.to_json()
    assert "codes and" in str(branches.parity)


@pytest.fixture(scope="module", params=[(2, 3), (5, 1), (1, 7)], ids=str)
def outputs(request: pytest.FixtureRequest, branches: Exported) -> tuple[dict[str, Tensor], Any, Any]:
    """Inputs, and what prepared model and engine make of them; only the first shape is the example's."""
    torch.manual_seed(1)
    inputs = exact(*request.param)
    with torch.no_grad():
        return inputs, branches.model(**inputs), OnnxModel(branches.folder)(**inputs)


@pytest.mark.parametrize("name", LINEARS)
def test_the_engine_computes_the_prepared_layer(
    branches: Exported, outputs: tuple[dict[str, Tensor], Any, Any], name: str
) -> None:
    """Both are sums of the same K products, and a bias, in float32.

    Each is within (K + 8) U of the exact one, times the sum of magnitudes (Higham 2002, section 4.2; 8 for
    the roundings of scales, of the decoded weight and of the bias).
    """
    inputs, prepared, engine = outputs
    layer = branches.model.linear[name]
    with torch.no_grad():
        seen = layer.input_quantizer(inputs["u" if per_tensor_affine(LINEARS[name]) else "x"]).double()
        weight = layer.weight_quantizer(layer.weight).double()
        bias = 0 if layer.bias is None else layer.bias.abs().double()
        bound = 2 * (WIDTH + 8) * U * (seen.abs() @ weight.abs().T + bias)
    assert ((engine[name].double() - prepared[name].double()).abs() <= bound).all()
    assert engine[name].shape == prepared[name].shape
    assert float(prepared[name].std()) > 0


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_equal_bit_for_bit(outputs: tuple[dict[str, Tensor], Any, Any], name: str) -> None:
    _, prepared, engine = outputs  # a code less its zero point is exact, and its scale rounds once
    assert torch.equal(engine[name], prepared[name])


INTEGER = ("w8a8", "w8a8-static", "w8a8-ort", "w8a8-ort-static")


@pytest.mark.parametrize("name", INTEGER)
def test_integer_products_do_not_saturate(
    branches: Exported, outputs: tuple[dict[str, Tensor], Any, Any], name: str
) -> None:
    """The largest weight times the largest input, everywhere: the sum of uint8 by int8 would saturate."""
    inputs, _, engine = outputs
    layer, values = branches.model.linear[f"{name}-no-bias"], inputs["u" if "ort" in name else "x"]
    largest = values[0, 0]
    assert (largest == largest[0]).all()
    exact_sum = WIDTH * float(largest[0]) * float(layer.weight_quantizer(layer.weight)[0, 0].detach())
    found = float(engine[f"{name}-no-bias"][0, 0, 0])
    assert abs(found - exact_sum) <= 4 * U * exact_sum  # both scales, their product, and its product
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in branches.file.graph.initializer}
    codes = stored[f"linear.{name}-no-bias.codes"]
    assert codes.dtype == np.uint8
    assert (codes[:, 0] == 255).all()


@pytest.mark.parametrize("name", [*INTEGER, "w8a16-channels", "4-bit-channels"])
def test_the_reference_of_onnx_agrees_where_it_has_the_operators(
    branches: Exported, outputs: tuple[dict[str, Tensor], Any, Any], name: str
) -> None:
    inputs, _, engine = outputs
    source = "u" if per_tensor_affine(SCHEMES[name]) else "x"
    part = utils.Extractor(branches.file).extract_model([source], [name])
    assert {node.domain for node in part.graph.node} == {""}
    (found,) = ReferenceEvaluator(part).run(None, {source: inputs[source].numpy()})
    weight = branches.converted.linear[name].weight.decode().double()
    magnitude = inputs[source].double().abs() @ weight.abs().T + 1  # a bias is at most 1 / sqrt(WIDTH)
    difference = (torch.from_numpy(found).double() - engine[name].double()).abs()
    assert (difference <= 2 * (WIDTH + 8) * U * magnitude).all()


def test_no_quantized_weight_is_in_the_file_as_floats(branches: Exported) -> None:
    stored = list(branches.file.graph.initializer)
    stored += [
        helper.get_attribute_value(attribute)
        for node in branches.file.graph.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TENSOR
    ]
    floats = {tensor.name: np.prod(tensor.dims) for tensor in stored if type_name(tensor) in WIDE}
    assert {name for name in floats if name.endswith(".codes")} == set()
    scales = max(module.weight.scale.numel() for module in branches.converted.modules() if coded(module))
    assert max(floats.values()) <= scales < min(FEATURES, WORDS) * WIDTH
    sizes = {tensor.name: len(tensor.raw_data) for tensor in stored}
    for name in ("w4a16", "w4a8", "w3a16"):
        assert sizes[f"linear.{name}.codes"] == FEATURES * WIDTH // 2
    assert sizes["linear.w2a8-ort.codes"] == FEATURES * WIDTH // 4


WIDE = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


def type_name(tensor: onnx.TensorProto) -> str:
    return onnx.TensorProto.DataType.Name(tensor.data_type)


def coded(module: nn.Module) -> bool:
    return isinstance(module, (CodedLinear, CodedEmbedding))


def test_the_metadata_names_outputs_and_modules(branches: Exported) -> None:
    metadata = {entry.key: entry.value for entry in branches.file.metadata_props}
    assert json.loads(metadata["recoup.outputs"]) == [*LINEARS, *EMBEDDINGS]
    modules = json.loads(metadata["recoup.modules"])
    assert set(modules) == set(PATHS)
    values = {name for node in branches.file.graph.node for name in (*node.input, *node.output)}
    assert {name for pair in modules.values() for name in (pair["input"], pair["output"])} <= values
    assert {opset.domain: opset.version for opset in branches.file.opset_import} == {
        "": 21,
        "com.microsoft": 1,
    }


def test_inputs_that_training_left_in_float_stay_in_float(branches: Exported) -> None:
    levels = {
        node.input[1].removeprefix("linear.").removesuffix(".codes"): attribute.i
        for node in branches.file.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {
        name: 4 if "a8-ort" in name else 1
        for name, scheme in LINEARS.items()
        if scheme.weights.granularity.columns is not None and isinstance(scheme.weights.format, IntFormat)
    }


def test_the_model_is_as_it_was_and_trains_on(branches: Exported) -> None:
    state = branches.model.state_dict()
    assert list(state) == list(branches.state)
    assert all(torch.equal(state[name], value) for name, value in branches.state.items())
    assert branches.model.training
    assert not any(module.training for module in branches.converted.modules())
    sum(y.square().sum() for y in branches.model(**exact(1, 2)).values()).backward()
    gradients = [p.grad for name, p in branches.model.named_parameters() if name.endswith("weight")]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    branches.model.zero_grad()


class Twice(nn.Module):
    """One layer at two places, called from both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.later = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        return self.later[0](torch.tanh(self.first(x)))


def test_a_module_that_stands_at_two_places_is_stored_once_and_every_call_proven(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = exported(
        ready(Twice(), {"first": "w8a8-ort-static"}, torch.randn(4, 64)), tmp_path / "out", torch.randn(3, 64)
    )
    assert (made.parity.modules, made.parity.codes) == (1, 64 * 64)
    assert [t.name for t in made.file.graph.initializer if t.name.endswith(".codes")] == ["first.codes"]
    (modules,) = (json.loads(e.value) for e in made.file.metadata_props if e.key == "recoup.modules")
    assert [values["input"] for values in modules.values()] == ["x", "tanh"]
    assert made.converted.first is made.converted.later[0]


class Namesake(nn.Module):
    """An output has the name that another value gets by its operation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inside = torch.tanh(x)
        return {"tanh": self.layer(inside), "add": inside + 1}


def test_an_output_may_have_the_name_of_an_operation_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = exported(ready(Namesake(), {}, torch.randn(4, 64)), tmp_path / "out", torch.randn(3, 64))
    assert [output.name for output in made.file.graph.output] == ["tanh", "add"]
    names = [name for node in made.file.graph.node for name in node.output]
    assert len(names) == len(set(names))
