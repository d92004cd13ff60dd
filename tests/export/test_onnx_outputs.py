"""Outputs that are quantized because they go into a sum: trained as written, and placed for TensorRT."""

import copy
import importlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup import (
    Recipe,
    Scheme,
    calibrate,
    convert,
    explain,
    export,
    param_groups,
    prepare,
    ptq,
    resolve,
)
from recoup.export import TARGETS, Parity, ParityError, preflight, verify
from recoup.nn import FakeQuantizer, output_quantizers, quantization_off
from recoup.schemes import PRESETS, Plan
from recoup.transforms import fuse
from tests.export import resnets as tiny

compare = importlib.import_module("recoup.export.onnx_qdq_parity").compare
trained = TARGETS["onnx-qdq"].trained
# What went around a block: from the ReLU of the stem, from a block, and through a projection.
RESIDUALS = ("stem.1", "blocks.0", "blocks.1.shortcut")


class Block(nn.Module):
    """As in ResNet: what goes around is the input itself, or a projection of it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = None
        if channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)  # called twice

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.shortcut is None else self.shortcut(x)
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += around
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16))
        self.last = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(torch.relu(self.last(self.blocks(self.stem(image)))).mean(dim=(2, 3)))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return fuse(ResNet().eval(), images())


def ready(outputs: tuple[str, ...] = RESIDUALS, scheme: Any = "w8a8-static") -> nn.Module:
    model = plain()
    prepare(model, resolve(model, Recipe(scheme=scheme, outputs=outputs)))
    return TARGETS["onnx-qdq"].settle(calibrate(model, [images()]))


def written(folder: Path, outputs: tuple[str, ...] = RESIDUALS) -> tuple[onnx.ModelProto, Parity, nn.Module]:
    model = ready(outputs)
    parity = export(model, folder, "onnx-qdq", example=images())
    return onnx.load(folder / "model.onnx"), parity, model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, onnx.ModelProto, Parity, nn.Module]:
    folder = tmp_path_factory.mktemp("resnet") / "out"
    return folder, *written(folder)


def sums(file: onnx.ModelProto) -> list[onnx.NodeProto]:
    stored = {tensor.name for tensor in file.graph.initializer}
    return [node for node in file.graph.node if node.op_type == "Add" and not stored & set(node.input)]


def test_the_residual_of_every_sum_has_a_pair_and_no_rule_is_broken(
    resnet: tuple[Path, onnx.ModelProto, Parity, nn.Module],
) -> None:
    _, file, parity, _ = resnet
    makers = {name: node.op_type for node in file.graph.node for name in node.output}
    assert [sorted(makers[name] for name in node.input) for node in sums(file)] == [
        ["Conv", "DequantizeLinear"]
    ] * 2
    assert parity.falls_back == {}


def test_a_residual_that_is_a_convolutions_input_too_is_rounded_once(
    resnet: tuple[Path, onnx.ModelProto, Parity, nn.Module],
) -> None:
    _, file, _, model = resnet
    one = model.get_submodule("stem.1.output_quantizer").scale
    assert torch.equal(model.get_submodule("blocks.0.conv1").input_quantizer.scale, one)
    scales = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer if t.name.endswith("_scale")}
    assert float(scales["stem.1.output_scale"]) == float(one)
    assert {f"{name}.output_scale" for name in RESIDUALS} <= set(scales)
    # of the input of both convolutions behind a quantized output there is nothing left
    assert "blocks.0.conv1.input_scale" not in scales
    assert not {"blocks.1.conv1.input_scale", "blocks.1.shortcut.0.input_scale"} & set(scales)


FORGOTTEN = {
    "the stem's": (("blocks.0", "blocks.1.shortcut"), "write outputs: [stem]"),
    "a projection": (("stem.1", "blocks.0"), "write outputs: [blocks.1.conv2 or blocks.1.shortcut]"),
}


@pytest.mark.parametrize(("outputs", "remedy"), FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_forgotten_residual_is_named_with_the_module_that_makes_it(
    outputs: tuple[str, ...], remedy: str, tmp_path: Path
) -> None:
    file, parity, _ = written(tmp_path / "out", outputs)
    assert parity.falls_back is not None
    ((node, line),) = parity.falls_back.items()
    assert node in {node.name for node in sums(file)}
    assert line.startswith("Add: no DequantizeLinear before it")
    assert remedy in line


def test_a_resnet_of_transformers_has_its_shortcuts_named(tmp_path: Path) -> None:
    model, batch = tiny.resnet(blocks=2)
    fuse(model, batch)
    recipe = Recipe.model_validate(
        {
            "scheme": "w8a8-static", "outputs": ["*.shortcut"],
            "rules": [{"match": "classifier", "scheme": "w8a8-static"}],
        }
    )  # fmt: skip
    forgetful = copy.deepcopy(model)
    settle = TARGETS["onnx-qdq"].settle
    settle(calibrate(prepare(model, resolve(model, recipe)), [batch]))
    parity = export(model, tmp_path / "out", "onnx-qdq", processor=tiny.Nothing())
    assert parity.falls_back == {}
    ptq(forgetful, recipe.model_copy(update={"outputs": ()}), [batch], observer="minmax")
    parity = export(settle(forgetful), tmp_path / "other", "onnx-qdq", processor=tiny.Nothing())
    stage = "resnet.encoder.stages"
    named = [
        line.partition("write outputs: ")[2].partition(" (")[0] for line in (parity.falls_back or {}).values()
    ]
    assert named == [
        "[resnet.embedder]",
        f"[{stage}.0.layers.0]",
        f"[{stage}.1.layers.0.layer or {stage}.1.layers.0.shortcut]",
    ]


WHERE = {
    "a convolution": ("blocks.1.conv2",),
    "a linear layer": ("fc",),
    "a module around others": ("blocks",),
}


@pytest.mark.parametrize("outputs", WHERE.values(), ids=WHERE)
def test_any_module_that_returns_a_tensor_may_be_named(outputs: tuple[str, ...], tmp_path: Path) -> None:
    file, parity, model = written(tmp_path / "out", outputs)
    assert list(output_quantizers(model)) == list(outputs)
    assert f"{outputs[0]}.output_scale" in {tensor.name for tensor in file.graph.initializer}
    assert parity.worst_module is not None
    assert parity.worst_module <= 1


@torch.no_grad()
def test_what_is_computed_is_on_the_lattice_and_float_without_it() -> None:
    model, x = ready(), images()
    seen: list[Tensor] = []
    handle = model.get_submodule("blocks.1.shortcut").register_forward_hook(lambda *_: seen.append(_[2]))
    model(x)
    handle.remove()
    scale = model.get_submodule("blocks.1.shortcut.output_quantizer").scale
    codes = seen[0] / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)  # float32 quotients of up to 127
    assert codes.abs().max() <= 128
    with quantization_off(model):
        assert torch.equal(model(x), plain()(x))


@torch.no_grad()
def test_conversion_changes_no_bit() -> None:
    model, x = ready((*RESIDUALS, "last")), images()
    before = model(x)
    assert torch.equal(convert(model)(x), before)
    assert list(output_quantizers(model)) == ["stem.1", "blocks.0", "blocks.1.shortcut", "last"]


def test_gradients_pass_and_learned_scales_of_outputs_are_trained() -> None:
    static = PRESETS["w8a8-static"]
    inputs = replace(static.inputs, ranges="learned")  # pyright: ignore[reportArgumentType]
    model = ready(scheme=replace(static, name="learned", inputs=inputs)).train()
    model(images()).square().mean().backward()
    for path in RESIDUALS:
        scale = model.get_submodule(f"{path}.output_quantizer").scale
        assert scale.grad is not None
        assert scale.grad.abs() > 0, path
        assert any(scale is parameter for group in param_groups(model, 1e-3) for parameter in group["params"])
    gradient = model.get_submodule("blocks.1.shortcut.0").weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_prepared_model_is_resumed_copied_and_pickled() -> None:
    model, x = ready(), images()
    plan = Plan.from_json(resolve(plain(), Recipe(scheme="w8a8-static", outputs=RESIDUALS)).to_json())
    again = prepare(plain(), plan)
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))


def test_the_account_names_them() -> None:
    model = plain()
    said = str(explain(model, resolve(model, Recipe(scheme="w8a8-static", outputs=("blocks.?",)))))
    assert said.splitlines()[-2:] == [
        "output of blocks.0: int8 per tensor, static",
        "output of blocks.1: int8 per tensor, static",
    ]


WRONG: dict[str, tuple[Any, str]] = {
    "no module": ({"outputs": ["block.0"]}, "outputs: 'block.0' matches no module; did you mean blocks.0"),
    "a list of modules": ({"outputs": ["lists"]}, "outputs: lists is a list of modules .* name those in it"),
    "inputs that are float": (
        {"scheme": Scheme(name="mine", weights=PRESETS["w8a8"].weights), "outputs": ["blocks.0"]},
        "outputs: .* 'mine' .* use w8a8-static"),
    "inputs that are dynamic": (
        {"scheme": "w8a8-ort", "outputs": ["blocks.0"]}, "outputs: .* 'w8a8-ort' .* use w8a8-static"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_quantized_is_refused(fields: Any, message: str) -> None:
    model = plain()
    model.lists = nn.ModuleList([nn.ReLU()])
    with pytest.raises(ValueError, match=message):
        resolve(model, Recipe.model_validate({"scheme": "w8a8-static"} | fields))


def test_a_plan_for_another_model_leaves_this_one_as_it_is() -> None:
    plan = resolve(plain(), Recipe(scheme="w8a8-static", outputs=("blocks.0",)))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"outputs: the model has no module 'blocks\.0'"):
        prepare(model, plan)
    assert type(model[0]) is nn.Linear


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x


def test_a_module_that_returns_no_tensor_is_named() -> None:
    model = Two()
    prepare(model, resolve(model, Recipe(scheme="w8a8-static", outputs=("both",))))
    with pytest.raises(ValueError, match=r"both\.output: the module returns a tuple, and only one tensor"):
        calibrate(model, [torch.randn(2, 4)])


@pytest.mark.parametrize("target", ["pytorch", "compressed-tensors", "gguf"])
def test_targets_that_hold_none_refuse_before_any_work(target: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, target, replace(TARGETS[target], check=lambda *_: None))
        model = plain()
        plan = resolve(model, Recipe(scheme="w8a8-static", outputs=("blocks.0",)))
        message = (
            r"outputs: blocks\.0 is to have a quantized output .*, which files for this target do not hold"
        )
        with pytest.raises(ValueError, match=message):
            preflight(model, plan, target)
        with pytest.raises(ValueError, match=message):
            export(ready(("blocks.0",)), tmp_path / "out", target, example=images())
    assert not list(tmp_path.iterdir())


def test_onnxruntime_has_outputs_in_integers_alone() -> None:
    model = plain()
    plan = resolve(model, Recipe(scheme="fp8-static", outputs=("blocks.0",)))
    with pytest.raises(
        ValueError, match=r"outputs: blocks\.0: onnxruntime has outputs in integers .*, not in 8"
    ):
        preflight(model, plan, "onnx")


def another_scale(file: onnx.ModelProto) -> None:
    tensor = next(
        tensor for tensor in file.graph.initializer if tensor.name == "blocks.1.shortcut.output_scale"
    )
    tensor.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(tensor), tensor.name))


def no_pair(file: onnx.ModelProto) -> None:
    entry = next(entry for entry in file.metadata_props if entry.key == "recoup.modules")
    entry.value = entry.value.replace("blocks.1.shortcut.output_quantizer", "stem.1.output_quantizer again 9")


DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "another scale": (another_scale, r"blocks\.1\.shortcut.*: the scale read back from the file"),
    "no pair": (no_pair, r"the outputs of other modules than the plan: blocks\.1\.shortcut"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_an_output_that_is_not_as_it_was_trained_is_found(
    damage: Callable[[onnx.ModelProto], None],
    message: str,
    resnet: tuple[Path, onnx.ModelProto, Parity, nn.Module],
    tmp_path: Path,
) -> None:
    _, file, _, model = resnet
    other = onnx.ModelProto()
    other.CopyFrom(file)
    damage(other)
    onnx.save(other, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=message):
        compare(trained(convert(copy.deepcopy(model)).eval(), tmp_path, images()), tmp_path)


def test_a_folder_is_verified_with_its_outputs(
    resnet: tuple[Path, onnx.ModelProto, Parity, nn.Module], tmp_path: Path
) -> None:
    folder = resnet[0]
    assert [(check.what, check.outcome) for check in verify(folder).checks] == [
        (what, "same") for what in ("files", "codes", "modules", "outputs")
    ]
    shutil.copytree(folder, tmp_path / "other")
    file = onnx.load(tmp_path / "other" / "model.onnx")
    another_scale(file)
    onnx.save(file, tmp_path / "other" / "model.onnx")
    found = [check.found for check in verify(tmp_path / "other").checks if check.outcome == "different"]
    assert any("blocks.1.shortcut.output_quantizer: the scale read back" in line for line in found)


def test_every_quantizer_is_calibrated_with_the_others() -> None:
    model = ready()
    found = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    assert all(quantizer.calibrated for quantizer in found)
    assert np.isfinite(float(model.get_submodule("blocks.0.output_quantizer").scale))
