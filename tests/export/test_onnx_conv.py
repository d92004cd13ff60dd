"""Convolutions of every kind and scheme: the bytes hold what was trained, and the engine computes it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from recoup import Recipe, export, prepare, resolve
from recoup.engines.onnxruntime import OnnxModel
from recoup.export import TARGETS, ParityError, preflight
from recoup.nn import CodedConv, seen_bias
from recoup.numerics import IntFormat
from recoup.schemes import PRESETS, Scheme

from .conftest import Exported, exported, ready

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

U = 2.0**-24  # half an ulp of float32
CHANNELS = 8
SIZE = (6, 9)
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: nn.Conv2d(CHANNELS, 5, 1),
    "padded": lambda: nn.Conv2d(CHANNELS, 5, 3, padding=1),
    "no-bias": lambda: nn.Conv2d(CHANNELS, 5, 3, bias=False),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 5, stride=2, padding=2, groups=CHANNELS),
    "grouped": lambda: nn.Conv2d(CHANNELS, 12, (1, 3), groups=4, padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(CHANNELS, 5, 3, stride=(1, 3), dilation=(2, 1), padding=(2, 1)),
    "same": lambda: nn.Conv2d(CHANNELS, 5, (2, 3), padding="same"),
    "valid": lambda: nn.Conv2d(CHANNELS, 5, (2, 3), padding="valid"),
    "reflect": lambda: nn.Conv2d(CHANNELS, 5, 3, padding=(1, 2), padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(CHANNELS, 5, (4, 3), padding="same", padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, padding_mode="circular", groups=2),
    "line": lambda: nn.Conv1d(CHANNELS, 6, 4, stride=2, padding=1, groups=2),
    "line-same": lambda: nn.Conv1d(CHANNELS, 6, 4, padding="same", dilation=2),
    "line-reflect": lambda: nn.Conv1d(CHANNELS, 6, 3, padding=1, padding_mode="reflect"),
    "volume": lambda: nn.Conv3d(CHANNELS, 5, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2)),
    "volume-grouped": lambda: nn.Conv3d(CHANNELS, 4, 2, groups=2, dilation=(1, 2, 1), bias=False),
    "volume-replicate": lambda: nn.Conv3d(CHANNELS, 4, 3, padding=1, padding_mode="replicate"),
}


def _schemes() -> dict[str, Scheme]:
    channels = PRESETS["w8a8-static"].weights
    inputs = PRESETS["w8a8-ort-static"].inputs
    assert inputs is not None
    names = ("w8a8-static", "w8a8-ort", "w8a8-ort-static", "w7a8-ort-static")
    return {name: PRESETS[name] for name in names} | {
        scheme.name: scheme
        for scheme in (
            Scheme(name="w8a16-channels", weights=channels),
            Scheme(name="4-bit-channels", weights=replace(channels, format=IntFormat(4, narrow=True))),
            PRESETS["fp8-static"],
            Scheme(name="fp8-channels", weights=PRESETS["fp8"].weights),
            Scheme(
                name="learned-both",
                weights=replace(channels, ranges="learned"),
                inputs=replace(inputs, ranges="learned"),
            ),
        )
    }


SCHEMES = _schemes()
KINDS = ("depthwise", "same", "no-bias", "circular", "line", "volume")  # of which every scheme has one
NAMES = {scheme: KINDS if scheme != "w8a8-ort-static" else tuple(CONVOLUTIONS) for scheme in SCHEMES}
PATHS = [f"{scheme}.{name}" for scheme, names in NAMES.items() for name in names]


class Convolutions(nn.Module):
    """Every convolution under one scheme, and some under every scheme, on the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        for scheme, names in NAMES.items():
            self.add_module(scheme, nn.ModuleDict({name: CONVOLUTIONS[name]() for name in names}))

    def forward(self, image: Tensor, line: Tensor, volume: Tensor) -> dict[str, Tensor]:
        inputs = {"image": image, "line": line, "volume": volume}
        return {path: self.get_submodule(path)(inputs[source(path)]) for path in PATHS}


def source(path: str) -> str:
    return next((kind for kind in ("line", "volume") if f".{kind}" in path), "image")


def exact(batch: int, length: int = 11) -> dict[str, Tensor]:
    """Inputs whose codes are beyond doubt: the range is 255 steps of 1 / 16 and holds zero."""

    def drawn(*shape: int) -> Tensor:
        x = torch.randint(-100, 156, shape).float()
        x[..., 0], x[..., -1] = 155.0, -100.0
        return x / 16

    return {
        "image": drawn(batch, CHANNELS, *SIZE),
        "line": drawn(batch, CHANNELS, length),
        "volume": drawn(batch, CHANNELS, 3, 4, 5),
    }


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    rules = {f"{name}.*": scheme for name, scheme in SCHEMES.items()}
    model = ready(Convolutions(), rules, exact(2))
    return exported(model, tmp_path_factory.mktemp("convolutions") / "out", exact(2))


@pytest.fixture(scope="module", params=[(2, 11), (5, 8), (1, 23)], ids=str)
def outputs(
    request: pytest.FixtureRequest, convolutions: Exported
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and what prepared model and engine make of them; only the first shape is the example's."""
    torch.manual_seed(1)
    inputs = exact(*request.param)
    with torch.no_grad():
        return inputs, convolutions.model(**inputs), OnnxModel(convolutions.folder)(**inputs)


def bound(model: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer in float64, and how far float32 may be from it: a sum of K products and a bias.

    In any order within (K + 8) U of the sum of magnitudes (Higham 2002, section 4.2; 8 for the roundings
    of scales, of the decoded weight and of the bias). Convolved by torch's own modules, in float64.
    """
    layer = model.get_submodule(path)
    twin = CONVOLUTIONS[path.partition(".")[2]]().double()
    with torch.no_grad():
        seen, weight = layer.input_quantizer(x).double(), layer.weight_quantizer(layer.weight).double()
        bias = seen_bias(layer)
        bias = None if bias is None else bias.double()
        state = {"weight": weight} | ({} if bias is None else {"bias": bias})
        twin.load_state_dict(state)
        value = twin(seen)
        twin.load_state_dict({name: tensor.abs() for name, tensor in state.items()})
        return value, (weight[0].numel() + 8) * U * twin(seen.abs())


@pytest.mark.parametrize("path", PATHS)
def test_the_bytes_hold_the_codes_and_scales_of_convert(convolutions: Exported, path: str) -> None:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in convolutions.file.graph.initializer}
    weight = convolutions.converted.get_submodule(path).weight
    shape = convolutions.model.get_submodule(path).weight.shape
    codes, dtype = stored[f"{path}.codes"], "float8_e4m3fn" if "fp8" in path else "int8"
    assert codes.dtype.name == dtype
    assert codes.shape == shape
    assert codes.view(weight.codes.numpy().dtype).ravel().tolist() == weight.codes.flatten().tolist()
    assert stored[f"{path}.scale"].ravel().tolist() == weight.scale.flatten().tolist()


@pytest.mark.parametrize("path", PATHS)
def test_the_engine_computes_the_prepared_convolution(
    convolutions: Exported,
    outputs: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    path: str,
) -> None:
    inputs, prepared, engine = outputs
    value, allowed = bound(convolutions.model, path, inputs[source(path)])
    assert engine[path].shape == prepared[path].shape == value.shape
    assert ((engine[path].double() - value).abs() <= allowed).all()
    assert float(value.std()) > 0


@pytest.fixture(scope="module")
def of_the_reference(convolutions: Exported) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    torch.manual_seed(2)
    inputs = exact(2)
    feeds = {name: x.numpy() for name, x in inputs.items()}
    file = convolutions.file
    names = [value.name for value in file.graph.output]
    return inputs, dict(zip(names, ReferenceEvaluator(file).run(None, feeds), strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_the_reference_of_onnx_agrees(
    convolutions: Exported, of_the_reference: tuple[dict[str, Tensor], dict[str, np.ndarray]], path: str
) -> None:
    inputs, found = of_the_reference
    value, allowed = bound(convolutions.model, path, inputs[source(path)])
    assert ((torch.from_numpy(found[path]).double() - value).abs() <= allowed).all()


def test_the_file_is_valid_onnx(convolutions: Exported) -> None:
    onnx.checker.check_model(convolutions.file, full_check=True)


def test_every_convolution_is_in_the_proof(convolutions: Exported) -> None:
    coded = [module for module in convolutions.converted.modules() if isinstance(module, CodedConv)]
    assert convolutions.parity.modules == len(coded) == len(PATHS)
    assert convolutions.parity.codes == sum(module.weight.codes.numel() for module in coded)
    assert 0 < convolutions.parity.worst_module <= 1


def test_no_quantized_weight_is_in_the_file_as_floats(convolutions: Exported) -> None:
    floats = [t for t in convolutions.file.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) == 12  # the scales of the widest


def test_a_session_quantizes_nothing_anew(convolutions: Exported, tmp_path: Path) -> None:
    """onnxruntime fuses what it recognizes as quantized, and would round biases and weights of its own."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine
    onnxruntime.InferenceSession(
        str(convolutions.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    nodes = [node.op_type for node in optimized.node]
    assert not {"QLinearConv", "ConvInteger"} & set(nodes)
    # those of 8-bit floats are fused with nothing
    left = [node for node in optimized.node if node.op_type == "DequantizeLinear"]
    assert all("fp8" in f"{node.name} {list(node.input)} {list(node.output)}" for node in left)
    assert sum(name in ("Conv", "FusedConv") for name in nodes) == len(PATHS)


class Blocks(nn.Module):
    """As in MobileNet: clipped at 6, which a quantizer behind makes superfluous; depthwise; added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(pixel_values))
        wide = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.wide(x))))
        return self.head((x + self.narrow(wide)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model = ready(Blocks(), {"*": "w8a8-ort-static"}, 3 * torch.randn(8, 3, 15, 15))
    return exported(model, tmp_path_factory.mktemp("blocks") / "out", torch.randn(4, 3, 15, 15))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_whole_network_runs_at_any_batch_size(blocks: Exported, batch: int) -> None:
    x = torch.randn(batch, 3, 15, 15)
    with torch.no_grad():
        assert OnnxModel(blocks.folder)(x).shape == blocks.converted(x).shape
    assert TARGETS["onnx"].verify(blocks.converted, blocks.folder, x).modules == 5


def edited(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def damage(file: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in file.graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))

    return damage


def one_ulp(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[3] = np.nextafter(array.reshape(-1)[3], np.float32(9))
    return array


def shifted_padding(file: onnx.ModelProto) -> None:
    (node,) = [node for node in file.graph.node if node.op_type == "Conv" and "depthwise.bias" in node.input]
    (pads,) = [attribute for attribute in node.attribute if attribute.name == "pads"]
    pads.ints[:] = [2, 1, 0, 1]


DAMAGES = {
    "a code": (edited("stem.codes", lambda a: a ^ (np.arange(a.size).reshape(a.shape) == 5)),
               "stem: the codes read back"),
    "a scale by one ulp": (edited("depthwise.scale", one_ulp), "depthwise: the scale read back"),
    "a bias": (edited("wide.bias", lambda a: 2 * a), "wide: onnxruntime's output"),
    "an input's scale": (edited("narrow.input_scale", lambda a: a * np.float32(1.01)),
                         "narrow: onnxruntime's output"),
    "padding on the other side": (shifted_padding, "depthwise: onnxruntime's output"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_caught(
    blocks: Exported, tmp_path: Path, damage: Callable[[onnx.ModelProto], None], message: str
) -> None:
    copied = shutil.copytree(blocks.folder, tmp_path / "copy")
    damage(file := onnx.load(copied / "model.onnx"))
    onnx.save(file, copied / "model.onnx")
    with pytest.raises(ParityError) as error:
        TARGETS["onnx"].verify(blocks.converted, copied, torch.randn(3, 3, 15, 15))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_groups_in_a_convolution_are_refused(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(32, 8, 1), nn.Linear(32, 4))
    with pytest.raises(ValueError, match="does not run in onnxruntime") as error:
        preflight(model, resolve(model, Recipe.model_validate({"scheme": name, "rules": []})), "onnx")
    message = str(error.value)
    assert message.startswith(f"0: scheme '{name}' does not run in onnxruntime on a CPU: convolutions with")
    assert "w8a8-static, w8a8-ort, w8a8-ort-static, fp8-static and int8 weights per channel do;" in message


def test_a_layer_of_gpt2_is_a_linear_layer(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(64, 32), nn.GELU(), Conv1D(3, 64))
    prepare(model, resolve(model, Recipe.model_validate({"scheme": "w4a16", "rules": []})))
    found = export(model, tmp_path / "out", "onnx", example=torch.randn(2, 5, 32))
    assert found.modules >= 1
    file = onnx.load(tmp_path / "out" / "model.onnx")
    assert "MatMulNBits" in {node.op_type for node in file.graph.node}
