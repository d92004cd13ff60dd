"""From codes to codes: what is written as QLinearConv and QLinearAdd, what is not, and that it is proved."""

import ast
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import recoup
from recoup.export import TARGETS, Parity, ParityError, preflight, verify
from recoup.export.onnx import SCOPES
from recoup.nn import CodedConv2d
from recoup.numerics import IntFormat
from recoup.schemes import PRESETS, Recipe, Scheme
from recoup.transforms import fuse
from tests.export.resnets import Nothing, resnet

SCHEME = PRESETS["w7a8-ort-static"]
assert SCHEME.inputs is not None
OTHERS = {
    "weights-of-8-bits": replace(
        SCHEME, name="8-bits", weights=replace(SCHEME.weights, format=IntFormat(8, narrow=True))
    ),
    "a-float-bias": replace(SCHEME, name="float-bias", integer_bias=False),
    "dynamic-inputs": PRESETS["w7a8-ort"],
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


class Twice(Chain):
    """The second convolution is asked for itself, and again for what it made."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.third(F.relu(self.second(y)))


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
        self.blocks = nn.Sequential(Bottleneck(adds=False), Bottleneck())
        self.last, self.act = nn.Conv2d(8, 32, 1), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.last(self.blocks(self.stem(x)))).mean(dim=(2, 3))


class Branches(nn.Module):
    """Every model of the table on the same images, in one file."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.ModuleDict({name: branch.make() for name, branch in BRANCHES.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: branch(x) for name, branch in self.of.items()}


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A model, and what is to be found of it in the file.

    Args:
        integer: its convolutions that are QLinearConv.
        sums: its sums that are QLinearAdd, by what they make.
        left: its activations and sums that are computed in float.
        wider: a quantizer whose scale is made larger after all that share one have been given it.
    """

    make: Callable[[], nn.Module]
    scheme: Scheme = SCHEME
    outputs: tuple[str, ...] = ()
    integer: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    wider: tuple[str, float] | None = None


def clipping(lowest: float, highest: float) -> Callable[[], nn.Module]:
    return lambda: Chain(lambda x: F.hardtanh(x, lowest, highest))


TWO = ("first", "second")
INSIDE = tuple(f"blocks.{block}.{name}" for block in range(2) for name in ("wide", "filter"))
NARROW = ("blocks.0.narrow", "blocks.1.narrow")
BRANCHES = {
    "relu6": Branch(make=lambda: Chain(F.relu6), integer=TWO),
    "no-activation": Branch(make=lambda: Chain(nn.Identity()), integer=TWO),
    "a-silu": Branch(make=lambda: Chain(F.silu)),
    "clip-that-the-lattice-does": Branch(make=clipping(0.0, 0.1), integer=TWO),
    "clip-below-zero": Branch(make=clipping(-0.1, 0.1), left=("Clip", "Clip")),
    "clip-inside-of-the-lattice": Branch(  # the last code of what the second reads is above 6
        make=lambda: Chain(F.relu6), integer=("second",), left=("Clip",), wider=("second.input_quantizer", 2)
    ),
    "two-readers-of-one-lattice": Branch(
        make=lambda: Fork(also_in_float=False), integer=TWO, left=("Add",)
    ),
    "two-readers-of-two-lattices": Branch(
        make=lambda: Fork(also_in_float=False), integer=("second",), left=("Add", "Relu"),
        wider=("other.input_quantizer", 1.5),
    ),
    "asked-in-float-too": Branch(
        make=lambda: Fork(also_in_float=True), integer=("second",), left=("Add", "Add", "Relu")
    ),
    # it has one bias and one scale in the file, in the form of both calls; and so has what it reads
    "called-twice": Branch(make=lambda: Twice(F.relu), left=("Relu", "Relu", "Relu")),
    **{name: Branch(make=lambda: Chain(F.relu), scheme=other, left=("Relu", "Relu"))
       for name, other in OTHERS.items()},
    "residuals-but-for-the-last": Branch(
        make=MobileNet, outputs=("stem", "blocks.?", "blocks.?.narrow"),
        integer=("stem", *INSIDE, *NARROW), sums=("blocks.1",), left=("Clip",),
    ),
    "residuals-of-blocks-alone": Branch(
        make=MobileNet, outputs=("blocks.?",), integer=("stem", *INSIDE, NARROW[0]), left=("Add", "Clip")
    ),
    "residuals-in-float": Branch(make=MobileNet, integer=("stem", *INSIDE), left=("Add", "Clip")),
}  # fmt: skip


def images() -> Tensor:
    return 3 * torch.randn(4, 3, 12, 12)


def ready(model: nn.Module, recipe: Recipe) -> nn.Module:
    model.eval()
    recoup.prepare(model, recoup.resolve(model, recipe))
    return TARGETS["onnx"].settle(recoup.calibrate(model, [images()]))


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file, the converted model it was written from, and its proof."""

    model: nn.Module
    folder: Path
    parity: Parity

    @property
    def file(self) -> onnx.ModelProto:
        return onnx.load(self.folder / "model.onnx")


def made(model: nn.Module, folder: Path) -> Made:
    parity = recoup.export(model, folder, "onnx", example=images())
    return Made(model=recoup.convert(model), folder=folder, parity=parity)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    return made(ready(Chain(F.relu), Recipe(scheme=SCHEME)), tmp_path_factory.mktemp("chain") / "out")


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Whose sums are all in codes."""
    torch.manual_seed(0)
    recipe = Recipe(scheme=SCHEME, outputs=("stem", "blocks.?", "blocks.?.narrow", "act"))
    return made(ready(MobileNet(), recipe), tmp_path_factory.mktemp("mobilenet") / "out")


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    outputs = [f"of.{name}.{pattern}" for name, each in BRANCHES.items() for pattern in each.outputs]
    rules = [{"match": f"of.{name}.*", "scheme": each.scheme} for name, each in BRANCHES.items()]
    recipe = Recipe.model_validate({"scheme": SCHEME, "rules": rules, "outputs": outputs})
    model = ready(Branches(), recipe)
    with torch.no_grad():
        for name, each in BRANCHES.items():
            if each.wider is not None:
                model.get_submodule(f"of.{name}.{each.wider[0]}").scale.mul_(each.wider[1])
    return made(model, tmp_path_factory.mktemp("branches") / "out")


def operators(file: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in file.graph.node)


def of_codes(file: onnx.ModelProto, op: str) -> list[str]:
    """The modules whose outputs are codes that such a node makes."""
    return [node.output[0].removesuffix(".output_codes") for node in file.graph.node if node.op_type == op]


def traced_in(file: onnx.ModelProto, path: str) -> Counter[str]:
    """The operators of a module that stayed as they were traced."""
    scopes = [
        (node.op_type, entry.value)
        for node in file.graph.node
        for entry in node.metadata_props
        if entry.key == SCOPES
    ]
    return Counter(op for op, scope in scopes if path in ast.literal_eval(scope))


def test_what_is_only_asked_in_codes_is_computed_in_integers(chain: Made) -> None:
    found = operators(chain.file)
    assert (found["QLinearConv"], found["Conv"], found["QuantizeLinear"]) == (2, 1, 1)
    assert not {"Relu", "Clip"} & set(found)
    assert chain.parity.modules == 3
    assert chain.parity.falls_back is not None
    assert len(chain.parity.falls_back) == 1


@pytest.mark.parametrize("name", BRANCHES)
def test_an_output_is_of_codes_where_all_that_is_made_of_it_are_and_else_a_float_sum(
    name: str, branches: Made
) -> None:
    path, branch, file = f"of.{name}", BRANCHES[name], branches.file
    for op, names in (("QLinearConv", branch.integer), ("QLinearAdd", branch.sums)):
        found = [each for each in of_codes(file, op) if each.startswith(f"{path}.")]
        assert sorted(found) == sorted(f"{path}.{each}" for each in names)
    left = traced_in(file, path)
    assert sorted(op for op in ("Add", "Clip", "Relu") for _ in range(left[op])) == sorted(branch.left)


def test_every_convolution_of_every_branch_is_proved_at_export_and_later(branches: Made) -> None:
    count = sum(isinstance(module, CodedConv2d) for module in branches.model.modules())
    assert branches.parity.modules == count
    found = operators(branches.file)
    again = 1  # is called twice
    assert found["QLinearConv"] + found["Conv"] == count + again
    assert branches.parity.worst_module is not None
    assert branches.parity.worst_module <= 1
    assert verify(branches.folder).same


def test_a_network_with_residuals_stays_in_codes_where_outputs_are_quantized(mobilenet: Made) -> None:
    found = operators(mobilenet.file)
    assert (found["QLinearConv"], found["QLinearAdd"], found["Conv"], found["Add"]) == (8, 1, 0, 0)
    assert found["QuantizeLinear"] == 1  # the image's
    assert mobilenet.parity.modules == 8
    assert mobilenet.parity.worst_module is not None
    assert mobilenet.parity.worst_module <= 1
    assert verify(mobilenet.folder).same


def test_a_resnet_of_transformers_stays_in_codes_through_its_pooling(tmp_path: Path) -> None:
    model, batch = resnet()
    fuse(model, batch)
    stages = "resnet.encoder.stages.?.layers.?"
    outputs = ("resnet.embedder.embedder", "*.shortcut", f"{stages}.layer.1", stages)
    recoup.prepare(model, recoup.resolve(model, Recipe(scheme=SCHEME, outputs=outputs)))
    TARGETS["onnx"].settle(recoup.calibrate(model, [batch]))
    parity = recoup.export(model, tmp_path / "out", "onnx", processor=Nothing())
    found = operators(onnx.load(tmp_path / "out" / "model.onnx"))
    assert (found["QLinearConv"], found["QLinearAdd"], found["Conv"], found["MaxPool"]) == (6, 2, 0, 1)
    # of the image, and of the mean before the classifier, which has a bias
    assert (found["QuantizeLinear"], found["Add"]) == (2, 1)
    assert parity.worst_module is not None
    assert parity.worst_module <= 1
    assert verify(tmp_path / "out").same


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
    said["blocks.1.wide"]["output on the lattice of"] = "blocks.9.filter"
    entry.value = json.dumps(said)


def a_scale(file: onnx.ModelProto) -> None:
    """A scale has another name, so that of an output is missing."""
    (tensor,) = (tensor for tensor in file.graph.initializer if tensor.name == "blocks.1.output_scale")
    tensor.name = "other"
    for node in file.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "other" if name == "blocks.1.output_scale" else name


SUM_IS_WRONG = r"blocks\.1\.output.*: onnxruntime's output is"
DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "adds something else": (a_sum, SUM_IS_WRONG),
    "another scale in the sum": (a_range, SUM_IS_WRONG),
    "a module that is not there": (
        a_name,
        r"blocks\.1\.wide: the file has codes on the lattice of b",
    ),
    "a scale that is not there": (a_scale, r"blocks\.1\.output.*: the file stores no scale of this output"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_sum_that_is_not_the_trained_one_is_found(
    damage: Callable[[onnx.ModelProto], None],
    message: str,
    mobilenet: Made,
    tmp_path: Path,
) -> None:
    damage(file := mobilenet.file)
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=message):
        TARGETS["onnx"].verify(mobilenet.model, tmp_path, images())


def test_a_bias_that_is_one_step_off_is_found(chain: Made, tmp_path: Path) -> None:
    file = chain.file
    (bias,) = (tensor for tensor in file.graph.initializer if tensor.name == "second.bias")
    stored = numpy_helper.to_array(bias)
    assert stored.dtype == np.int32
    bias.CopyFrom(numpy_helper.from_array(stored + np.eye(1, len(stored), 5, np.int32)[0], bias.name))
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"second: the bias codes read back .* at \(5,\)"):
        TARGETS["onnx"].verify(chain.model, tmp_path, images())


def test_a_code_of_a_weight_that_moved_is_found(chain: Made, tmp_path: Path) -> None:
    file = chain.file
    (codes,) = (tensor for tensor in file.graph.initializer if tensor.name == "second.codes")
    stored = numpy_helper.to_array(codes).copy()
    stored[3, 0, 1, 1] += 1
    codes.CopyFrom(numpy_helper.from_array(stored, codes.name))
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"second: the codes read back .* at \(3, 4\)"):
        TARGETS["onnx"].verify(chain.model, tmp_path, images())


@pytest.mark.parametrize("scheme", ["w7a8-ort", "w7a8-ort-static"])
def test_fields_of_eight_bits_are_no_waste_where_seven_have_a_kernel_of_their_own(scheme: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 4))
    if scheme == "w7a8-ort":  # convolutions are float sums there, of any width
        model = model[2:]
    computed = preflight(model, recoup.resolve(model, scheme), "onnx")  # a warning would be an error
    assert all("fields of 8 bits" in kernel for kernel in computed.values())


def test_no_sum_of_two_products_leaves_sixteen_bits(chain: Made) -> None:
    """So that the file means the same on x86 with VNNI and without."""
    for tensor in chain.file.graph.initializer:
        if tensor.name.endswith(".codes"):
            assert 2 * 255 * np.abs(numpy_helper.to_array(tensor).astype(int)).max() < 2**15
