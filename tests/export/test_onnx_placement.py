"""TensorRT's rules for QuantizeLinear and DequantizeLinear, each kept and each broken, by node."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from recoup import Recipe, Scheme, calibrate, export, prepare, resolve
from recoup.export import TARGETS, Parity
from recoup.schemes import PRESETS
from recoup.transforms import fuse

placement = importlib.import_module("recoup.export.onnx_placement")  # `recoup.export` is the function


class Dense(nn.Module):
    """As in DenseNet and Inception: a tensor and what a convolution made of it, side by side; pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(16, 8, 1)
        self.pooled = nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(8 * 16, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        both = torch.cat([x, 3 * torch.relu(self.first(x))], dim=1)
        y = torch.relu(self.second(self.pool(both))) + 0.5
        y = y + torch.relu(self.pooled(self.pool(both)))
        return self.out(torch.relu(self.last(y.flatten(1))))


class Skip(nn.Module):
    """As in ResNet: a sum with what went around two convolutions, and the mean over all places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(x + self.norm2(self.conv2(y)))
        return self.fc(torch.relu(self.next(y)).mean(dim=(2, 3)))


def exported(
    kind: type[nn.Module], scheme: Scheme | str, folder: Path, *, fused: bool = True, settled: bool = True
) -> tuple[onnx.ModelProto, Parity, nn.Module]:
    torch.manual_seed(0)
    model = kind().eval()
    images = torch.randn(4, 3, 8, 8)
    if fused:
        fuse(model, images)
    recipe = Recipe.model_validate({"scheme": scheme, "rules": [{"match": "*", "scheme": scheme}]})
    calibrate(prepare(model, resolve(model, recipe)), [images])
    if settled:
        TARGETS["onnx-qdq"].settle(model)
    parity = export(model, folder, "onnx-qdq", example=images)
    return onnx.load(folder / "model.onnx"), parity, model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, Parity, nn.Module]:
    return exported(Dense, "w8a8-static", tmp_path_factory.mktemp("dense") / "out")


@pytest.fixture(scope="module")
def skip(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, Parity, nn.Module]:
    return exported(Skip, "w8a8-static", tmp_path_factory.mktemp("skip") / "out")


def test_a_settled_network_with_concat_pools_and_reshape_breaks_no_rule(
    dense: tuple[onnx.ModelProto, Parity, nn.Module],
) -> None:
    file, parity, _ = dense
    assert {"Concat", "MaxPool", "Reshape", "Conv", "MatMul"} <= {node.op_type for node in file.graph.node}
    assert parity.falls_back == {}
    assert placement.violations(file) == {}


def test_what_went_around_is_rounded_with_one_scale_in_training_and_in_the_file(
    dense: tuple[onnx.ModelProto, Parity, nn.Module],
) -> None:
    file, _, model = dense
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    together = ("first", "second", "pooled")
    scales = {float(model.get_submodule(name).input_quantizer.scale) for name in together}
    assert len(scales) == 1
    assert {float(stored[f"{name}.input_scale"]) for name in together} == scales
    others = {float(stored[f"{name}.input_scale"]) for name in ("stem.0", "last", "out")}
    assert len(others) == 3
    assert not others & scales


def test_the_largest_scale_is_the_one_of_all(
    dense: tuple[onnx.ModelProto, Parity, nn.Module], tmp_path: Path
) -> None:
    _, parity, alone = exported(Dense, "w8a8-static", tmp_path / "out", settled=False)
    scales = [
        float(alone.get_submodule(name).input_quantizer.scale) for name in ("first", "second", "pooled")
    ]
    assert scales[0] < max(scales)
    assert float(dense[2].first.input_quantizer.scale) == max(scales)
    assert parity.falls_back is not None
    assert len(parity.falls_back) == 3
    for line in parity.falls_back.values():
        assert line.startswith("QuantizeLinear of ")
        assert "shared-scale: a tensor and its views" in line


def test_a_residual_in_float_is_named_with_what_it_costs(
    skip: tuple[onnx.ModelProto, Parity, nn.Module],
) -> None:
    file, parity, _ = skip
    stored = {tensor.name for tensor in file.graph.initializer}
    (node,) = [node for node in file.graph.node if node.op_type == "Add" and not stored & set(node.input)]
    assert parity.falls_back is not None
    assert list(parity.falls_back) == [node.name]
    line = parity.falls_back[node.name]
    assert line.startswith("Add: no DequantizeLinear before it, so ")
    assert (
        "residual: the residual input of a sum is quantized, or the fused convolution writes floats" in line
    )
    assert line.endswith("recommendation 4)")
    assert "in floats: 1 (parity.json names them)" in str(parity)


def test_a_batch_norm_behind_codes_is_named(tmp_path: Path) -> None:
    file, parity, _ = exported(Skip, "w8a8-static", tmp_path / "out", fused=False, settled=False)
    norms = {node.name for node in file.graph.node if node.op_type == "BatchNormalization"}
    assert parity.falls_back is not None
    assert len(norms) == 2
    assert norms <= set(parity.falls_back)
    assert all("call recoup.transforms.fuse before prepare" in parity.falls_back[name] for name in norms)


OTHERS = {
    "zero points": ("w8a8-ort-static", "QuantizeLinear of stem.0", "its zero point is"),
    "dynamic": ("w8a8-ort", "DynamicQuantizeLinear", "TensorRT quantizes as it runs only in blocks"),
    "float inputs": (Scheme(name="weights", weights=PRESETS["w8a8"].weights), "Conv of first",
                     "not from a DequantizeLinear"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "node", "found"), OTHERS.values(), ids=OTHERS)
def test_lattices_that_tensorrt_has_not_are_named(
    scheme: Scheme | str, node: str, found: str, tmp_path: Path
) -> None:
    _, parity, _ = exported(Dense, scheme, tmp_path / "out", settled=False)
    assert parity.falls_back is not None
    assert any(line.startswith(node) and found in line for line in parity.falls_back.values())


def test_e4m3_with_one_scale_is_placed_alike(tmp_path: Path) -> None:
    _, parity, _ = exported(Dense, "fp8-static", tmp_path / "out")
    assert parity.falls_back == {}


def weight_with_zero_points(file: onnx.ModelProto) -> None:
    node = next(node for node in file.graph.node if "first.codes" in node.input)
    file.graph.initializer.append(numpy_helper.from_array(np.full(8, 3, np.int8), "first.zero_point"))
    node.input.append("first.zero_point")


def weight_as_uint8(file: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "first.codes")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).view(np.uint8), "first.codes"))


def bias_as_codes(file: onnx.ModelProto) -> None:
    at, node = next((at, node) for at, node in enumerate(file.graph.node) if "first.bias" in node.input)
    codes = numpy_helper.from_array(np.ones(8, np.int32), "first.bias_codes")
    scale = numpy_helper.from_array(np.float32(0.1), "first.bias_scale")
    file.graph.initializer.extend([codes, scale])
    pair = helper.make_node("DequantizeLinear", ["first.bias_codes", "first.bias_scale"], ["bias_of_first"])
    file.graph.node.insert(at, pair)
    node.input[2] = "bias_of_first"


def scale_for_every_channel(file: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "last.input_scale")
    tensor.CopyFrom(numpy_helper.from_array(np.ones(128, np.float32), "last.input_scale"))


BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "weights with zero points": (
        weight_with_zero_points,
        "Conv of first: its weight has zero points (weights: ",
    ),
    "weights in uint8": (weight_as_uint8, "Conv of first: its codes are UINT8 (weights: "),
    "a quantized bias": (bias_as_codes, "Conv of first: its bias comes from DequantizeLinear (bias: "),
    "activations per channel": (
        scale_for_every_channel,
        "QuantizeLinear of last: it has 128 scales (activations: ",
    ),
}


@pytest.mark.parametrize(("damage", "line"), BROKEN.values(), ids=BROKEN)
def test_each_other_rule_finds_the_node_that_breaks_it(
    dense: tuple[onnx.ModelProto, Parity, nn.Module], damage: Callable[[onnx.ModelProto], None], line: str
) -> None:
    file = onnx.ModelProto()
    file.CopyFrom(dense[0])
    damage(file)
    (found,) = placement.violations(file).values()
    assert found.startswith(line)


def test_every_rule_says_where_it_is_from_and_is_broken_somewhere_here() -> None:
    seen = {"inputs", "batch-norm", "residual", "activations", "weights", "bias", "shared-scale"}
    assert set(placement.RULES) == seen
    assert all(rule.source for rule in placement.RULES.values())


def test_learned_scales_are_not_shared(tmp_path: Path) -> None:
    static = PRESETS["w8a8-static"]
    assert static.inputs is not None
    scheme = replace(static, name="learned", inputs=replace(static.inputs, ranges="learned"))
    _, parity, model = exported(Dense, scheme, tmp_path / "out")
    quantizers = [model.get_submodule(name).input_quantizer for name in ("first", "second", "pooled")]
    assert len({quantizer.scale.detach().item() for quantizer in quantizers}) > 1
    assert parity.falls_back is not None
    assert sum("shared-scale" in line for line in parity.falls_back.values()) == 3
