"""Transposed convolutions in every target that has them: the bytes, the engine, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup import export, resolve
from recoup.export import TARGETS, ParityError, preflight
from recoup.export.export import converted_copy
from recoup.export.rebuilt import Convolution
from recoup.export.verify import verify
from recoup.nn import CodedConv1d, CodedConvTranspose1d, CodedConvTranspose3d
from recoup.schemes import PRESETS
from tests.models import recipe

from .conftest import ready

CHANNELS = 8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: nn.ConvTranspose2d(CHANNELS, 6, 1),
    "doubling": lambda: nn.ConvTranspose2d(CHANNELS, 6, 2, stride=2),
    "uneven": lambda: nn.ConvTranspose2d(
        CHANNELS, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)
    ),
    "grouped": lambda: nn.ConvTranspose2d(CHANNELS, 6, 3, stride=2, groups=2, dilation=2, bias=False),
    "line": lambda: nn.ConvTranspose1d(CHANNELS, 6, 4, stride=2, padding=1),
    "volume": lambda: nn.ConvTranspose3d(CHANNELS, 4, 2, stride=(1, 2, 1), groups=4),
}
SCHEMES = ("w8a8-static", "w7a8-ort-static", "w8a8-ort")


class Layers(nn.Module):
    """Every layer, on the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: build() for name, build in LAYERS.items()})

    def forward(self, line: Tensor, image: Tensor, volume: Tensor) -> dict[str, Tensor]:
        inputs = {"line": line, "volume": volume}
        return {f"from {name}": layer(inputs.get(name, image)) for name, layer in self.layers.items()}


def batch(samples: int) -> dict[str, Tensor]:
    shapes = {"line": (5,), "image": (4, 3), "volume": (2, 3, 3)}
    return {name: torch.randn(samples, CHANNELS, *shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("target", "scheme"),
    [*(("onnx", scheme) for scheme in SCHEMES), ("onnx-qdq", "w8a8-static"), ("pytorch", "w8a8-ort")],
)
@torch.no_grad()
def test_the_engine_computes_what_was_trained(target: str, scheme: str, tmp_path: Path) -> None:
    model, example = Layers().eval(), batch(2)
    ready(model, {"*": scheme}, example)
    parity = export(model, tmp_path / "out", target, example=example)
    assert parity.modules == len(LAYERS)
    assert 0 < parity.worst_module <= 1
    assert {check.outcome for check in verify(tmp_path / "out").checks} == {"same"}
    converted, other = converted_copy(model), batch(3)
    assert TARGETS[target].verify(converted, tmp_path / "out", other).modules == len(LAYERS)
    shapes = {name: y.shape for name, y in TARGETS[target].load(tmp_path / "out")(**other).items()}
    assert shapes == {name: y.shape for name, y in converted(**other).items()}


DAMAGES = {
    "codes": ("layers.line.codes", lambda a: a[::-1].copy(), "layers.line: the codes read back"),
    "a scale": ("layers.uneven.scale", lambda a: a * np.float32(2), "layers.uneven: the scale read back"),
    "a bias": ("layers.volume.bias", lambda a: a + np.float32(1), "layers.volume: "),
}  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "onnx-qdq"])
@torch.no_grad()
def test_a_damaged_file_is_caught(target: str, tmp_path: Path) -> None:
    model, example = Layers().eval(), batch(2)
    ready(model, {"*": "w8a8-static"}, example)
    export(model, tmp_path / "out", target, example=example)
    whole = onnx.load(tmp_path / "out" / "model.onnx")
    for name, edit, message in DAMAGES.values():
        file = onnx.ModelProto()
        file.CopyFrom(whole)
        (tensor,) = [tensor for tensor in file.graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor)), name))
        onnx.save(file, tmp_path / "out" / "model.onnx")
        with pytest.raises(ParityError) as error:
            TARGETS[target].verify(converted_copy(model), tmp_path / "out", example)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a16"])
def test_one_axis_holds_the_scales_in_onnxs_own_operators_where_one_can(scheme: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(32, 6, 2, stride=2), nn.ConvTranspose2d(6, 6, 1, groups=2))
    example = torch.randn(2, 32, 3, 3)
    ready(model, {"0": scheme, "1": "w8a8-static"}, example)
    parity = export(model, tmp_path / "out", "onnx-qdq", example=example)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    first, second = (makers[node.input[1]] for node in graph.node if node.op_type == "ConvTranspose")
    if scheme == "w8a8-static":
        assert first.op_type == "DequantizeLinear"
        assert [attribute.i for attribute in first.attribute if attribute.name == "axis"] == [1]
        assert stored["0.codes"].shape == (32, 6, 2, 2)
        assert not [line for line in (parity.falls_back or {}).values() if " of 0:" in line]
    else:
        assert stored["0.codes"].shape == (6, 128)
    assert second.op_type == "Reshape"
    assert stored["1.codes"].shape == (6, 3)
    broken = " ".join((parity.falls_back or {}).values())
    assert "ConvTranspose of 1: its weight is put into groups behind its DequantizeLinear" in broken


@pytest.mark.parametrize("target", ["onnx", "onnx-qdq", "pytorch"])
def test_a_size_that_a_caller_asks_for_is_in_no_file(target: str, tmp_path: Path) -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 4, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[2 * x.shape[-1] + 2])

    model, x = Asked().eval(), torch.randn(2, 4, 5)
    ready(model, {"*": "w8a8-static"}, x)
    message = (
        f"^{target.removesuffix('-qdq')}: up is called with output_size beside its input, and a quantized "
        "ConvTranspose1d is written as a function of that alone; give it the output_padding that comes to "
        "this size, or keep it with "
        r"\{match: up, scheme: none\}$"
    )
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", target, example=x)


def test_what_onnxruntime_has_no_kernel_for_is_refused_before_work() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(32, 8, 1))
    with pytest.raises(ValueError, match="0: scheme 'w4a16' does not run in onnxruntime on a CPU: convol"):
        preflight(model, resolve(model, recipe("w4a16")), "onnx")


RECORDED = {
    "no output_padding": {"output_padding": None},
    "an axis too many": {"output_padding": (0, 0)},
    "too long": {"output_padding": (2000,)},
    "padding by name": {"padding": "same"},
    "padding of another mode": {"padding_mode": "reflect"},
}


@pytest.mark.parametrize("field", RECORDED.values(), ids=RECORDED)
def test_a_record_that_is_no_transposed_convolution_is_refused(field: dict[str, Any]) -> None:
    geometry: dict[str, Any] = {"kernel_size": (3,), "stride": (2,), "padding": (0,), "dilation": (1,)}
    geometry |= {"in_channels": 4, "groups": 2, "padding_mode": "zeros", "output_padding": (1,)}
    Convolution(**geometry).check("up", CodedConvTranspose1d, 6)
    with pytest.raises(ValueError, match=r"^up: Convolution\(.*\) is no convolution of 6 columns$"):
        Convolution(**geometry | field).check("up", CodedConvTranspose1d, 6)
    with pytest.raises(ValueError, match="is no convolution of 6 columns"):
        Convolution(**geometry).check("up", CodedConv1d, 6)


def test_the_kernel_is_named() -> None:
    scheme = PRESETS["w7a8-ort-static"]  # whose convolutions run in integers
    for kind in (CodedConvTranspose1d, CodedConvTranspose3d):
        named = {target: TARGETS[target].kernel(scheme, kind) for target in ("onnx", "onnx-qdq", "pytorch")}
        assert named == {
            "onnx": "ConvTranspose of integers made float",
            "onnx-qdq": "ConvTranspose behind DequantizeLinear of weights and inputs",
            "pytorch": "conv_transpose of integers made float",
        }
