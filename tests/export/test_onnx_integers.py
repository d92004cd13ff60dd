"""From codes to codes: what is written as QLinearConv and QLinearAdd, what is not, and that it is proved."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import recoup
from recoup.export import TARGETS, Parity, ParityError, preflight, verify
from recoup.numerics import IntFormat
from recoup.schemes import PRESETS, Recipe
from recoup.transforms import fuse

SCHEME = PRESETS["w7a8-ort-static"]
assert SCHEME.inputs is not None
OTHERS = {
    "weights of 8 bits": replace(
        SCHEME, name="mine", weights=replace(SCHEME.weights, format=IntFormat(8, narrow=True))
    ),
    "a float bias": replace(SCHEME, name="mine", integer_bias=False),
    "dynamic inputs": PRESETS["w7a8-ort"],
}


class Chain(nn.Module):
    """Three convolutions, the second depthwise, and an activation between them."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.third = nn.Conv2d(16, 8, 1, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.activation(self.second(self.activation(self.first(x)))))


class Fork(Chain):
    """The first convolution is asked twice, in codes or also in float."""

    def __init__(self, *, also_in_float: bool) -> None:
        super().__init__(F.relu)
        self.other = nn.Conv2d(16, 16, 1)
        self.also_in_float = also_in_float

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        branch = self.other(y) + y if self.also_in_float else self.other(y)
        return self.third(F.relu(self.second(y))) + branch[:, :8]


def images() -> Tensor:
    return 3 * torch.randn(4, 3, 12, 12)


def ready(model: nn.Module, scheme: object = SCHEME, outputs: tuple[str, ...] = ()) -> nn.Module:
    model.eval()
    recoup.prepare(model, recoup.resolve(model, Recipe(scheme=scheme, outputs=outputs)))
    return TARGETS["onnx"].settle(recoup.calibrate(model, [images()]))


def written(model: nn.Module, folder: Path) -> tuple[onnx.ModelProto, Parity]:
    parity = recoup.export(model, folder, "onnx", example=images())
    return onnx.load(folder / "model.onnx"), parity


def operators(file: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in file.graph.node)


@pytest.mark.parametrize("activation", [F.relu, F.relu6, nn.Identity()], ids=["relu", "relu6", "none"])
def test_what_is_only_asked_in_codes_is_computed_in_integers(
    activation: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file, parity = written(ready(Chain(activation)), tmp_path / "out")
    found = operators(file)
    assert (found["QLinearConv"], found["Conv"], found["QuantizeLinear"]) == (2, 1, 1)
    assert not {"Relu", "Clip"} & set(found)
    assert parity.modules == 3
    assert parity.falls_back is not None
    assert len(parity.falls_back) == 1


@pytest.mark.parametrize(
    ("model", "scheme", "integer"),
    [
        (lambda: Chain(F.silu), SCHEME, 0),
        (lambda: Chain(lambda x: F.hardtanh(x, 0.0, 0.1)), SCHEME, 2),
        (lambda: Chain(lambda x: F.hardtanh(x, -0.1, 0.1)), SCHEME, 0),
        (lambda: Fork(also_in_float=False), SCHEME, 2),
        (lambda: Fork(also_in_float=True), SCHEME, 1),
        *((lambda: Chain(F.relu), other, 0) for other in OTHERS.values()),
    ],
    ids=["silu", "clip that the lattice does", "clip below zero", "two readers of one lattice",
         "asked in float too", *OTHERS],
)  # fmt: skip
def test_other_outputs_are_float_sums(
    model: Callable[[], nn.Module], scheme: object, integer: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    assert operators(written(ready(model(), scheme), tmp_path / "out")[0])["QLinearConv"] == integer


class Twice(Chain):
    """The second convolution is asked for itself, and again for what it made."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.third(F.relu(self.second(y)))


def test_a_convolution_that_is_called_twice_stays_in_float_sums(tmp_path: Path) -> None:
    """It has one bias and one scale in the file, in the form of both calls; and so has what it reads."""
    torch.manual_seed(0)
    file, parity = written(ready(Twice(F.relu)), tmp_path / "out")
    found = operators(file)
    assert (found["QLinearConv"], found["Conv"]) == (0, 4)
    assert parity.modules == 3


class Bottleneck(nn.Module):
    """As in MobileNetV2: wide, filtered, narrow, and added to what came in."""

    def __init__(self, *, adds: bool = True) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)
        self.filter = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.relu6(self.filter(F.relu6(self.wide(x)))))
        return x + y if self.adds else y


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Bottleneck(), Bottleneck(adds=False), Bottleneck())
        self.last, self.act = nn.Conv2d(8, 32, 1), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.last(self.blocks(self.stem(x)))).mean(dim=(2, 3))


ALL = ("stem", "blocks.?", "blocks.?.narrow", "act")


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (ALL, {"QLinearConv": 11, "QLinearAdd": 2, "QuantizeLinear": 1}),
        (("stem", "blocks.?", "blocks.?.narrow"), {"QLinearConv": 10, "QLinearAdd": 2, "Conv": 1}),
        (("blocks.?",), {"QLinearConv": 7, "Conv": 4, "Add": 2}),
        ((), {"QLinearConv": 6, "Conv": 5, "Add": 2}),
    ],
    ids=["all", "not the last", "blocks alone", "none"],
)
def test_a_network_with_residuals_stays_in_codes_where_outputs_are_quantized(
    outputs: tuple[str, ...], found: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file, parity = written(ready(MobileNet(), outputs=outputs), tmp_path / "out")
    counted = operators(file)
    assert {name: counted[name] for name in ("QLinearConv", "QLinearAdd", "Conv", "Add")} == {
        "QLinearConv": 0, "QLinearAdd": 0, "Conv": 0, "Add": 0,
    } | {name: count for name, count in found.items() if name != "QuantizeLinear"}  # fmt: skip
    if "QuantizeLinear" in found:  # the image's alone
        assert counted["QuantizeLinear"] == found["QuantizeLinear"]
    assert parity.modules == 11
    assert parity.worst_module is not None
    assert parity.worst_module <= 1
    assert verify(tmp_path / "out").same


def test_a_resnet_of_transformers_stays_in_codes_through_its_pooling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: Any = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes)).eval()
    batch = {"pixel_values": torch.randn(4, 3, 32, 32)}
    fuse(model, batch)
    stages = "resnet.encoder.stages.?.layers.?"
    outputs = ("resnet.embedder.embedder", "*.shortcut", f"{stages}.layer.1", stages)
    recoup.prepare(model, recoup.resolve(model, Recipe(scheme=SCHEME, outputs=outputs)))
    TARGETS["onnx"].settle(recoup.calibrate(model, [batch]))
    parity = recoup.export(model, tmp_path / "out", "onnx", processor=Nothing())
    found = operators(onnx.load(tmp_path / "out" / "model.onnx"))
    assert (found["QLinearConv"], found["QLinearAdd"], found["Conv"], found["MaxPool"]) == (10, 4, 0, 1)
    # of the image, and of the mean before the classifier, which has a bias
    assert (found["QuantizeLinear"], found["Add"]) == (2, 1)
    assert parity.worst_module is not None
    assert parity.worst_module <= 1
    assert verify(tmp_path / "out").same


class Nothing:
    """Takes the place of an image processor."""

    def save_pretrained(self, folder: Path) -> None:
        assert folder.is_dir()


def a_sum(file: onnx.ModelProto) -> None:
    """Adds the first tensor to itself."""
    node = next(node for node in file.graph.node if node.op_type == "QLinearAdd")
    node.input[3:6] = node.input[:3]


def a_range(file: onnx.ModelProto) -> None:
    """What goes into the sum is scaled by another number than it was made with."""
    node = next(node for node in file.graph.node if node.op_type == "QLinearAdd")
    (scale,) = (tensor for tensor in file.graph.initializer if tensor.name == node.input[4])
    other = numpy_helper.from_array(1.02 * numpy_helper.to_array(scale), "another_scale")
    file.graph.initializer.append(other)
    node.input[4] = other.name


def a_name(file: onnx.ModelProto) -> None:
    """The file says of some codes that they are on the lattice of a module that it has not."""
    entry = next(entry for entry in file.metadata_props if entry.key == "recoup.modules")
    said = json.loads(entry.value)
    said["blocks.0.wide"]["output on the lattice of"] = "blocks.9.filter"
    entry.value = json.dumps(said)


def a_scale(file: onnx.ModelProto) -> None:
    """A scale has another name, so that of an output is missing."""
    (tensor,) = (tensor for tensor in file.graph.initializer if tensor.name == "blocks.0.output_scale")
    tensor.name = "other"
    for node in file.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "other" if name == "blocks.0.output_scale" else name


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Converted, and the folder that it was written to."""
    torch.manual_seed(0)
    model, folder = ready(MobileNet(), outputs=ALL), tmp_path_factory.mktemp("mobilenet") / "out"
    written(model, folder)
    return recoup.convert(model), folder


SUM_IS_WRONG = r"blocks\.0\.output.*: onnxruntime's output is"
DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "adds something else": (a_sum, SUM_IS_WRONG),
    "another scale in the sum": (a_range, SUM_IS_WRONG),
    "a module that is not there": (
        a_name,
        r"blocks\.0\.wide: the file has codes on the lattice of b",
    ),
    "a scale that is not there": (a_scale, r"blocks\.0\.output.*: the file stores no scale of this output"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_sum_that_is_not_the_trained_one_is_found(
    damage: Callable[[onnx.ModelProto], None],
    message: str,
    mobilenet: tuple[nn.Module, Path],
    tmp_path: Path,
) -> None:
    model, folder = mobilenet
    file = onnx.load(folder / "model.onnx")
    damage(file)
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=message):
        TARGETS["onnx"].verify(model, tmp_path, images())


def test_two_readers_of_two_lattices_keep_the_output_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ready(Fork(also_in_float=False))
    with torch.no_grad():
        model.other.input_quantizer.scale.mul_(1.5)
    assert operators(written(model, tmp_path / "out")[0])["QLinearConv"] == 1


def test_a_clip_inside_of_the_lattice_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ready(Chain(F.relu6))
    with torch.no_grad():
        model.second.input_quantizer.scale.mul_(2)  # its last code is above 6 now
    found = operators(written(model, tmp_path / "out")[0])
    assert (found["QLinearConv"], found["Clip"]) == (1, 1)


def test_a_bias_that_is_one_step_off_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ready(Chain(F.relu))
    file, _ = written(model, tmp_path / "out")
    (bias,) = (tensor for tensor in file.graph.initializer if tensor.name == "second.bias")
    stored = numpy_helper.to_array(bias)
    assert stored.dtype == np.int32
    bias.CopyFrom(numpy_helper.from_array(stored + np.eye(1, len(stored), 5, np.int32)[0], bias.name))
    onnx.save(file, tmp_path / "out" / "model.onnx")
    with pytest.raises(ParityError, match=r"second: the bias codes read back .* at \(5,\)"):
        TARGETS["onnx"].verify(recoup.convert(model), tmp_path / "out", images())


def test_a_code_of_a_weight_that_moved_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ready(Chain(F.relu))
    file, _ = written(model, tmp_path / "out")
    (codes,) = (tensor for tensor in file.graph.initializer if tensor.name == "second.codes")
    stored = numpy_helper.to_array(codes).copy()
    stored[3, 0, 1, 1] += 1
    codes.CopyFrom(numpy_helper.from_array(stored, codes.name))
    onnx.save(file, tmp_path / "out" / "model.onnx")
    with pytest.raises(ParityError, match=r"second: the codes read back .* at \(3, 4\)"):
        TARGETS["onnx"].verify(recoup.convert(model), tmp_path / "out", images())


@pytest.mark.parametrize("scheme", ["w7a8-ort", "w7a8-ort-static"])
def test_fields_of_eight_bits_are_no_waste_where_seven_have_a_kernel_of_their_own(scheme: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 4))
    if scheme == "w7a8-ort":  # convolutions are float sums there, of any width
        model = model[2:]
    computed = preflight(model, recoup.resolve(model, scheme), "onnx")  # a warning would be an error
    assert all("fields of 8 bits" in kernel for kernel in computed.values())


def test_no_sum_of_two_products_leaves_sixteen_bits(tmp_path: Path) -> None:
    """So that the file means the same on x86 with VNNI and without."""
    torch.manual_seed(0)
    file, _ = written(ready(Chain(F.relu)), tmp_path / "out")
    for tensor in file.graph.initializer:
        if tensor.name.endswith(".codes"):
            assert 2 * 255 * np.abs(numpy_helper.to_array(tensor).astype(int)).max() < 2**15
