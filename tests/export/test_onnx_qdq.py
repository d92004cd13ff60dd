"""Files of ONNX's own operators: every lattice that ONNX has types for, as the operators are defined."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup import Recipe, Scheme, export, prepare, resolve
from recoup.engines.onnx_standard import NO_ENGINE, StandardOnnx
from recoup.export import TARGETS, ParityError, preflight
from recoup.numerics import E5M2, IntFormat, per_group, per_tensor
from recoup.schemes import PRESETS, preset

from .conftest import Exported, ready

qdq = importlib.import_module("recoup.export.onnx_qdq")  # `recoup.export` is the function

U = 2.0**-24  # half an ulp of float32
WIDTH, FEATURES, WORDS = 256, 32, 6
FUSED_OFF = "onnxruntime, nothing fused"


def _own() -> list[Scheme]:
    weights, static = PRESETS["w4a16"].weights, PRESETS["w8a8-ort-static"].inputs
    assert static is not None
    affine = replace(weights, scale_rule="affine")
    return [
        Scheme(name="uint2-affine", weights=replace(affine, format=IntFormat(2, signed=False))),
        Scheme(name="uint4-affine", weights=replace(affine, format=IntFormat(4, signed=False))),
        Scheme(name="int4-affine", weights=replace(affine, format=IntFormat(4))),
        Scheme(name="uint8-affine", weights=replace(affine, format=IntFormat(8, signed=False))),
        Scheme(name="5-bits", weights=replace(weights, format=IntFormat(5))),
        Scheme(name="groups-of-8", weights=replace(weights, granularity=per_group(8))),
        Scheme(name="e5m2", weights=replace(PRESETS["fp8"].weights, format=E5M2)),
        Scheme(name="tensor", weights=replace(PRESETS["w8a8"].weights, granularity=per_tensor)),
        Scheme(name="learned", weights=replace(PRESETS["w8a8"].weights, ranges="learned"),
               inputs=replace(static, ranges="learned")),
        replace(PRESETS["fp8-block"], name="blocks",
                weights=replace(PRESETS["nvfp4-2d"].weights, format=PRESETS["fp8"].weights.format,
                                scale_format=PRESETS["fp8"].weights.scale_format, global_scale=False)),
    ]  # fmt: skip


WITHOUT_ENGINE = ("mxfp8", "mxfp4", "mxfp4a16", "nvfp4", "nvfp4a16", "nvfp4-2d", "nvfp4-4over6")
NAMES = (
    *("w8a16", "w4a16", "w3a16", "w2a16", "w4a8", "w2a8", "w4a8-ort", "w8a8", "w8a8-static", "w8a8-ort"),
    *("w8a8-ort-static", "fp8", "fp8-static", "w4afp8", "w4a16-g128"),
)
RUN = {scheme.name: scheme for scheme in (*map(preset, NAMES), *_own())}
SCHEMES = RUN | {name: PRESETS[name] for name in WITHOUT_ENGINE}
EMBEDDINGS = ("w8a16", "w4a16", "w2a16", "uint4-affine", "e5m2")
CONVOLUTIONS = ("w8a16", "w4a16", "uint4-affine", "tensor", "w8a8-static", "w8a8-ort-static", "fp8-static")
CHANNELS, KERNEL = 8, 2  # an output sums over 32 products, which groups divide


class Branches(nn.Module):
    """Every scheme that one engine or none computes, on the same inputs."""

    def __init__(
        self, names: tuple[str, ...], tables: tuple[str, ...], convolutions: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.conv = nn.ModuleDict({name: nn.Conv2d(CHANNELS, 4, KERNEL) for name in convolutions})
        self.linear = nn.ModuleDict({name: nn.Linear(WIDTH, FEATURES) for name in names})
        self.table = nn.ModuleDict({name: nn.Embedding(WORDS, WIDTH) for name in tables})

    def forward(self, x: Tensor, ids: Tensor, image: Tensor) -> dict[str, Tensor]:
        found = {name: linear(x) for name, linear in self.linear.items()}
        found |= {f"conv-{name}": conv(image) for name, conv in self.conv.items()}
        return found | {f"table-{name}": table(ids) for name, table in self.table.items()}


def batch(samples: int, tokens: int) -> dict[str, Tensor]:
    x = torch.randn(samples, tokens, WIDTH)
    x[0, 0] = 0.0  # a token, and its blocks, of nothing
    image = torch.randn(samples, CHANNELS, 5, 4)
    return {"x": x, "ids": torch.randint(0, WORDS, (samples, tokens)), "image": image}


def made(model: nn.Module, rules: dict[str, Scheme | str], folder: Path, example: object) -> Exported:
    ready(model, rules, example)
    parity = export(model, folder, "onnx-qdq", example=example)
    return Exported(model, {}, model, folder, onnx.load(folder / "model.onnx"), parity)


@pytest.fixture(scope="module", params=[True, False], ids=["onnxruntime", "reference"])
def branches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    tables = EMBEDDINGS if request.param else ("mxfp4a16", "nvfp4a16")
    names, convolutions = (tuple(RUN), CONVOLUTIONS) if request.param else (WITHOUT_ENGINE, tables)
    rules: dict[str, Scheme | str] = {f"linear.{name}": SCHEMES[name] for name in names}
    rules |= {f"table.{name}": SCHEMES[name] for name in tables}
    rules |= {f"conv.{name}": SCHEMES[name] for name in convolutions}
    return made(
        Branches(names, tables, convolutions), rules, tmp_path_factory.mktemp("qdq") / "out", batch(2, 3)
    )


def test_every_module_is_proved_and_the_engine_is_named(branches: Exported) -> None:
    linears = branches.model.linear
    assert branches.parity.modules == len(linears) + len(branches.model.table) + len(branches.model.conv)
    assert branches.parity.engine == (NO_ENGINE if "nvfp4" in linears else FUSED_OFF)
    assert json.loads((branches.folder / "parity.json").read_text())["engine"] == branches.parity.engine
    assert f"computed by {branches.parity.engine}" in str(branches.parity)
    assert 0 < branches.parity.worst_module <= 1


@pytest.mark.parametrize("shape", [(1, 5), (3, 1)], ids=str)
def test_the_operators_compute_the_prepared_model(branches: Exported, shape: tuple[int, int]) -> None:
    """Both are sums of the same K products, and a bias, in float32 (Higham 2002, section 4.2).

    8 for the roundings of scales, weight and bias; inputs at a tie may move by one step, so they are put on
    the lattice once by torch and must agree in all but few.
    """
    torch.manual_seed(1)
    given = batch(*shape)
    with torch.no_grad():
        prepared, found = branches.model(**given), StandardOnnx(branches.folder)(**given)
        for name, layer in branches.model.linear.items():
            seen, weight = layer.input_quantizer(given["x"]).double(), layer.weight_quantizer(layer.weight)
            bound = 2 * (WIDTH + 8) * U * (seen.abs() @ weight.double().abs().T + layer.bias.abs().double())
            assert ((found[name].double() - prepared[name].double()).abs() <= bound).all(), name
        for name, layer in branches.model.conv.items():
            seen, weight = (
                layer.input_quantizer(given["image"]).double(),
                layer.weight_quantizer(layer.weight),
            )
            bias = layer.bias.abs().double()
            magnitude = nn.functional.conv2d(seen.abs(), weight.double().abs(), bias)
            bound = 2 * (CHANNELS * KERNEL**2 + 8) * U * magnitude
            difference = found[f"conv-{name}"].double() - prepared[f"conv-{name}"].double()
            assert (difference.abs() <= bound).all(), name
        for name in branches.model.table:
            assert torch.equal(found[f"table-{name}"], prepared[f"table-{name}"]), name


TYPES = {
    "w4a16": ("INT4", "FLOAT"),
    "w3a16": ("INT4", "FLOAT"),
    "w2a16": ("INT2", "FLOAT"),
    "5-bits": ("INT8", "FLOAT"),
    "uint4-affine": ("UINT4", "FLOAT"),
    "uint2-affine": ("UINT2", "FLOAT"),
    "fp8": ("FLOAT8E4M3FN", "FLOAT"),
    "e5m2": ("FLOAT8E5M2", "FLOAT"),
    "mxfp8": ("FLOAT8E4M3FN", "FLOAT8E8M0"),
    "mxfp4": ("FLOAT4E2M1", "FLOAT8E8M0"),
    "nvfp4": ("FLOAT4E2M1", "FLOAT8E4M3FN"),
}


def test_codes_and_scales_have_onnxs_own_types_and_their_bits(branches: Exported) -> None:
    tensors = {tensor.name: tensor for tensor in branches.file.graph.initializer}
    compared = 0
    for name in set(TYPES) & set(branches.model.linear):
        codes, scale = tensors[f"linear.{name}.codes"], tensors[f"linear.{name}.scale"]
        types = [onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in (codes, scale)]
        assert types == list(TYPES[name]), name
        bits = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}.get(TYPES[name][0], 8)
        assert len(codes.raw_data) == WIDTH * FEATURES * bits // 8
        module = branches.converted.get_submodule(f"linear.{name}")
        assert TARGETS["onnx-qdq"].width(module.scheme, type(module)) == bits
        compared += 1
    assert compared >= 3


def test_the_file_is_onnx_alone_in_the_first_opset_with_its_types(branches: Exported) -> None:
    opsets = {opset.domain: opset.version for opset in branches.file.opset_import}
    assert opsets == {"": 24 if "mxfp4" in branches.model.linear else 25}
    assert {node.domain for node in branches.file.graph.node} <= {""}
    assert qdq.opset(PRESETS["w8a8"], PRESETS["w4a16"], PRESETS["fp8"]) == 21
    assert [qdq.opset(PRESETS[name]) for name in ("nvfp4", "mxfp8", "w2a16")] == [23, 24, 25]


def test_numpys_own_types_decode_the_same_weights(branches: Exported) -> None:
    """A second decoder, of another library: ml_dtypes."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in branches.file.graph.initializer}
    for name, layer in branches.model.linear.items():
        if f"linear.{name}.zero_point" in arrays or name in ("blocks", "nvfp4-2d"):
            continue
        codes = arrays[f"linear.{name}.codes"].astype(np.float32)
        scale = arrays[f"linear.{name}.scale"].astype(np.float32)
        if f"linear.{name}.global_scale" in arrays:
            scale = scale * arrays[f"linear.{name}.global_scale"]
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else np.repeat(scale, WIDTH // scale.shape[1], 1)
        with torch.no_grad():
            trained = layer.weight_quantizer(layer.weight).numpy()
        assert np.array_equal(codes * scale, trained), name


REFUSED = {
    "mxfp6": ("mxfp6", "ONNX has no type for e2m3"),
    "nf4": ("nf4", "ONNX has no type for nf4"),
    "offsets": ("q4_1", "DequantizeLinear has no offset"),
    "int8 inputs without -128": ("q8_0", "QuantizeLinear has no int8 inputs with 127 as largest"),
    "inputs by another rule": (
        replace(PRESETS["w8a8"], name="half",
                inputs=replace(PRESETS["w8a8"].inputs, scale_rule="half-range")), "inputs int8 per row"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_onnx_has_no_form_for_is_refused_before_any_work(scheme: Scheme | str, reason: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    plan = resolve(model, Recipe.model_validate({"scheme": scheme}))
    with pytest.raises(ValueError, match="has no form in ONNX") as error:
        preflight(model, plan, "onnx-qdq")
    message = str(error.value)
    assert message.startswith(f"0: scheme {plan.modules['0']!r} has no form in ONNX: ")
    assert reason in message
    assert "\n" not in message


def test_an_onnx_that_lacks_the_opset_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 24)
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(ValueError, match="needs opset 25") as error:
        preflight(model, resolve(model, "w2a16"), "onnx-qdq")
    found = f"and onnx {onnx.__version__} writes up to 24: pip install 'onnx>=1.20'"
    assert str(error.value) == f"0: scheme 'w2a16' needs opset 25, {found}"
    preflight(model, resolve(model, "w4a16"), "onnx-qdq")


def tensor(file: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(stored for stored in file.graph.initializer if stored.name == name)


def one_bit(file: onnx.ModelProto, name: str) -> None:
    data = bytearray(tensor(file, name).raw_data)
    data[3 % len(data)] ^= 16
    tensor(file, name).raw_data = bytes(data)


DAMAGES = {
    "a code": ("0.codes", "0: the codes read back"),
    "a block's scale": ("0.scale", "0: the scale read back"),
    "the scale of scales": ("0.global_scale", "0: the global scale read back"),
    "an input's scale of scales": ("0.input_global_scale", "0: onnx.reference (no CPU engine)'s output"),
    "a bias": ("0.bias", "0: onnx.reference (no CPU engine)'s output"),
    "what stays in float": ("2.weight", "outputs differ from the trained model's"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3)), torch.randn(3, 64)
    plan = {"scheme": "nvfp4", "rules": [{"match": "2", "scheme": "none"}]}
    prepare(model, resolve(model, Recipe.model_validate(plan)))
    importlib.import_module("recoup").calibrate(model, [x])
    folder = tmp_path_factory.mktemp("small") / "out"
    export(model, folder, "onnx-qdq", example=x)
    return importlib.import_module("recoup").convert(model).eval(), folder, x


@pytest.mark.parametrize(("name", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_caught(
    small: tuple[nn.Module, Path, Tensor], tmp_path: Path, name: str, message: str
) -> None:
    model, folder, x = small
    file = onnx.load(folder / "model.onnx")
    if name in ("2.weight", "0.bias", "0.input_global_scale"):
        stored = tensor(file, name)
        stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(1.5), name))
    else:
        one_bit(file, name)
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ParityError) as error:
        TARGETS["onnx-qdq"].verify(model, tmp_path, x)
    assert message in str(error.value)


def test_a_file_that_is_no_valid_onnx_is_caught(
    small: tuple[nn.Module, Path, Tensor], tmp_path: Path
) -> None:
    model, folder, x = small
    file = onnx.load(folder / "model.onnx")
    next(node for node in file.graph.node if node.op_type == "MatMul").op_type = "MatMull"
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="the file is no valid ONNX"):
        TARGETS["onnx-qdq"].verify(model, tmp_path, x)


def test_e8m0_scales_of_inputs_are_rounded_up_as_rceil_does() -> None:
    """Around every power of two, where a block's largest value over the format's is one: exact in both."""
    hi = 6.0
    amax = np.array([hi * 2.0**e for e in range(-20, 20)], np.float32)
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(np.inf)), np.nextafter(amax, np.float32(0))])
    spec = PRESETS["mxfp4"].inputs
    assert spec is not None
    numerics = importlib.import_module("recoup.numerics")
    x = torch.tensor(amax)[:, None].expand(-1, 32).contiguous()
    trained = numerics.qparams_of(x, spec).scale.flatten().numpy()
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])
    cast = onnx.helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT8E8M0, round_mode="up")
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT8E8M0, [None])
    graph = onnx.helper.make_graph([cast], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (found,) = importlib.import_module("onnx.reference").ReferenceEvaluator(model).run(None, {"x": amax / hi})
    assert found.dtype == ml_dtypes.float8_e8m0fnu
    assert np.array_equal(found.astype(np.float32), trained)
