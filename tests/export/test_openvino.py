"""The files that onnxruntime proves, and those of ONNX's own operators, in OpenVINO's CPU plugin."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recoup import Scheme, export
from recoup.nn import Batch
from recoup.numerics import IntFormat
from recoup.schemes import PRESETS

from .conftest import ready

U = 2.0**-24  # half an ulp of float32
WIDTH, FEATURES, WORDS, CHANNELS = 256, 24, 12, 8


def seven_bits(name: str) -> Scheme:
    """The preset with weights from -63 to 63.

    OpenVINO multiplies the codes of a pair of QuantizeLinear and DequantizeLinear, by oneDNN; without VNNI
    that adds two products of uint8 and int8 in 16 bits, where 2 x 255 x 63 fits and 2 x 255 x 127 does not.
    """
    scheme = PRESETS[name]
    return replace(
        scheme, name=f"7-bit-{name}", weights=replace(scheme.weights, format=IntFormat(7, narrow=True))
    )


CONVOLUTIONS = ("w8a8-static", "w8a8-ort", "w8a8-ort-static")
SCHEMES: dict[str, dict[str, Scheme]] = {
    "onnx": {name: PRESETS[name] for name in (
        *("w4a16", "w3a16", "w2a16", "w8a16", "w4a8", "w8a8"), *CONVOLUTIONS)},
    "onnx-qdq": {name: PRESETS[name] for name in ("w4a16", "w3a16", "w8a16", "w4a8", "w8a8", "fp8-static")}
    | {name: seven_bits(name) for name in CONVOLUTIONS},
}  # fmt: skip
TABLES = {"onnx": ("w8a16", "w4a16", "w2a16"), "onnx-qdq": ("w8a16", "w4a16")}
Run = tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]


class Branches(nn.Module):
    def __init__(self, linears: tuple[str, ...], tables: tuple[str, ...]) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({name: nn.Linear(WIDTH, FEATURES) for name in linears})
        self.table = nn.ModuleDict({name: nn.Embedding(WORDS, WIDTH) for name in tables})
        self.conv = nn.ModuleDict({name: nn.Conv2d(CHANNELS, 5, 3, padding=1) for name in CONVOLUTIONS})

    def forward(self, x: Tensor, ids: Tensor, image: Tensor) -> dict[str, Tensor]:
        found = {f"linear-{name}": layer(x) for name, layer in self.linear.items()}
        found |= {f"conv-{name}": layer(image) for name, layer in self.conv.items()}
        return found | {f"table-{name}": table(ids) for name, table in self.table.items()}


def batch(samples: int) -> dict[str, Tensor]:
    """Integers in all inputs, from -100 to 155 in 16ths: no code of theirs lies at a tie."""
    x = torch.randint(-100, 156, (samples, 3, WIDTH)).float()
    image = torch.randint(-100, 156, (samples, CHANNELS, 6, 7)).float()
    for values in (x, image):
        values[..., 0], values[..., -1] = 155.0, -100.0
    return {"x": x / 16, "ids": torch.randint(0, WORDS, (samples, 3)), "image": image / 16}


def in_openvino(folder: Path, given: Batch) -> dict[str, Tensor]:
    """As a user runs it, but for sums, which an accelerated CPU would else make in bfloat16."""
    openvino = importlib.import_module("openvino")
    # with VNNI it also quantizes the inputs of compressed weights, in groups of 32, unless it is told not to
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    model = openvino.Core().compile_model(folder / "model.onnx", "CPU", exact)
    results = model({name: value.numpy() for name, value in dict(given).items()})
    return {port.get_any_name(): torch.from_numpy(value.copy()) for port, value in results.items()}


@pytest.fixture(scope="module", params=["onnx", "onnx-qdq"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The prepared model, inputs, and what OpenVINO makes of them."""
    torch.manual_seed(0)
    schemes, tables = SCHEMES[request.param], TABLES[request.param]
    rules: dict[str, Scheme | str] = {f"linear.{name}": scheme for name, scheme in schemes.items()}
    rules |= {f"table.{name}": name for name in tables}
    rules |= {f"conv.{name}": schemes[name] for name in CONVOLUTIONS}
    model = ready(Branches(tuple(schemes), tables), rules, batch(2))
    folder = tmp_path_factory.mktemp("openvino") / "out"
    export(model, folder, request.param, example=batch(2))
    given = batch(3)
    return model, given, in_openvino(folder, given)


def test_linear_layers_are_within_their_bound(run: Run) -> None:
    model, given, found = run
    with torch.no_grad():
        for name, layer in model.linear.items():
            seen = layer.input_quantizer(given["x"]).double()
            weight = layer.weight_quantizer(layer.weight).double()
            value = seen @ weight.T + layer.bias.double()
            # a sum of K products and a bias (Higham 2002, section 4.2), 8 for the other roundings
            bound = (WIDTH + 8) * U * (seen.abs() @ weight.abs().T + layer.bias.abs().double())
            assert ((found[f"linear-{name}"].double() - value).abs() <= bound).all(), name


def test_convolutions_are_within_their_bound(run: Run) -> None:
    model, given, found = run
    with torch.no_grad():
        for name, layer in model.conv.items():
            seen = layer.input_quantizer(given["image"]).double()
            weight = layer.weight_quantizer(layer.weight).double()
            value = nn.functional.conv2d(seen, weight, layer.bias.double(), padding=1)
            magnitude = nn.functional.conv2d(seen.abs(), weight.abs(), layer.bias.abs().double(), padding=1)
            bound = (weight[0].numel() + 8) * U * magnitude
            assert ((found[f"conv-{name}"].double() - value).abs() <= bound).all(), name


def test_embeddings_are_equal(run: Run) -> None:
    model, given, found = run
    with torch.no_grad():
        for name, table in model.table.items():
            assert torch.equal(found[f"table-{name}"], table(given["ids"])), name


def test_openvino_leaves_inputs_in_float_that_matmulnbits_quantizes_in_onnxruntime(tmp_path: Path) -> None:
    """Accuracy level 4 is a hint to it, so w4a8-ort is another function there: its weights are the same."""
    torch.manual_seed(0)
    model = ready(
        nn.Sequential(nn.Linear(WIDTH, FEATURES)), {"0": PRESETS["w4a8-ort"]}, torch.randn(2, WIDTH)
    )
    x = torch.randn(4, WIDTH)
    export(model, tmp_path / "out", "onnx", example=x)
    (found,) = in_openvino(tmp_path / "out", {"input": x}).values()
    with torch.no_grad():
        weight = model[0].weight_quantizer(model[0].weight).double()
        value = x.double() @ weight.T + model[0].bias.double()
        bound = (WIDTH + 8) * U * (x.double().abs() @ weight.abs().T + model[0].bias.abs().double())
        assert ((found.double() - value).abs() <= bound).all()
        assert ((found - model(x)).abs() > bound).any()
