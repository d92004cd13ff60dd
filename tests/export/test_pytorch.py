"""Programs of torch.export: the bytes hold what was trained, and torch computes it, without recoup too."""

import copy
import importlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup import Recipe, Scheme, convert, export, prepare, ptq, resolve
from recoup.engines.pytorch import PytorchModel
from recoup.export import TARGETS, Parity, ParityError, preflight
from recoup.export.answers import named_rows, relative_rms
from recoup.nn import Codes, call, is_coded
from recoup.numerics import BFLOAT16, Granularity, IntFormat, per_block, per_tensor
from recoup.schemes import PRESETS, preset
from tests.models import MODELS, Residual, Row, Shared, images

from . import conftest
from .conftest import EMBEDDINGS, SCHEMES, Branches, exact, noise, ready

writer = importlib.import_module("recoup.export.pytorch")
lowering = importlib.import_module("recoup.export.pytorch_modules")
parity = importlib.import_module("recoup.export.pytorch_parity")
common = importlib.import_module("recoup.export.parity")  # `recoup.export` is the function

# What a user without recoup types. The processor's best product of bytes may be taken away from outside.
ALONE = """
import sys
import torch
from safetensors.torch import load_file, save_file
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    found = program(**load_file(sys.argv[2]))
assert not any(name.partition(".")[0] in ("recoup", "transformers") for name in sys.modules)
save_file({name: value.contiguous() for name, value in found.items()}, sys.argv[3])
"""


@dataclass(frozen=True)
class Written:
    model: nn.Module
    converted: nn.Module
    folder: Path
    parity: Parity


class Processor:
    """A tokenizer of no files: models of transformers are asked for one."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def written(model: nn.Module, folder: Path, example: object) -> Written:
    proved = export(model, folder, "pytorch", example=example, processor=Processor())
    return Written(model, convert(copy.deepcopy(model)).eval(), folder, proved)


def _own() -> dict[str, Scheme]:
    """Schemes that onnxruntime has no operators for, and torch has."""
    integers, grouped = PRESETS["w8a8"], PRESETS["w4a16"].weights
    assert integers.inputs is not None
    return {
        "per-tensor": replace(integers, weights=replace(integers.weights, granularity=per_tensor)),
        "4-bits-in-integers": replace(
            integers, weights=replace(integers.weights, format=IntFormat(4, narrow=True))
        ),
        "blocks": Scheme(name="blocks", weights=replace(grouped, granularity=per_block(2, 32))),
        "bfloat16-scales": Scheme(name="bf16", weights=replace(grouped, scale_format=BFLOAT16)),
        "signed-affine-inputs": replace(
            integers, inputs=replace(integers.inputs, scale_rule="affine", format=IntFormat(8))
        ),
        "affine-inputs-per-token": replace(
            integers,
            inputs=replace(integers.inputs, scale_rule="affine", format=IntFormat(8, signed=False)),
        ),
    }


NAMES = [
    *("w8a16", "w4a16", "w3a16", "w2a16", "w4a8", "w4a8-ort", "w2a16-g16", "w4a16-g128"),
    *("w8a8", "w8a8-static", "w8a8-ort", "w8a8-ort-static", "learned-both", "w8a16-channels"),
    *("affine-unsigned", "affine-signed", "affine-3-bits-per-token"),
]
TABLE = {name: SCHEMES[name] for name in NAMES}
TABLE |= {name: replace(scheme, name=name) for name, scheme in _own().items()}
TABLE |= {f"{name}-no-bias": SCHEMES[name] for name in ("w8a8", "w4a16")}
TABLES = {
    name: EMBEDDINGS[name] for name in ("embedding-w8a16", "embedding-w3a16", "embedding-affine-unsigned")
}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "LINEARS", TABLE)
        patch.setattr(conftest, "EMBEDDINGS", TABLES)
        model = ready(
            Branches(),
            {f"linear.{name}": scheme for name, scheme in TABLE.items()}
            | {f"embedding.{name}": scheme for name, scheme in TABLES.items()},
            exact(2, 3),
        )
        made = written(model, tmp_path_factory.mktemp("programs") / "out", noise(2, 3))
        yield made


PATHS = [
    *(f"linear.{name}" for name in TABLE),
    *(f"embedding.{name}" for name in TABLES),
]


@pytest.fixture(scope="session")
def engine(programs: Written) -> PytorchModel:
    return PytorchModel(programs.folder)


@dataclass(frozen=True)
class Ran:
    """One batch, and what came out of it."""

    inputs: dict[str, Tensor]
    here: dict[str, Tensor]
    alone: dict[str, Tensor]


@pytest.fixture(scope="session")
def ran(programs: Written, engine: PytorchModel, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """In this process; and in a fresh one without recoup, whose processor has no exact product of bytes."""
    folder = tmp_path_factory.mktemp("alone")
    torch.manual_seed(1)
    inputs = noise(3, 5)
    save_file(inputs, folder / "inputs")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, (engine_file(programs), folder / "inputs", folder / "out"))],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return Ran(inputs, engine(**inputs), load_file(folder / "out"))


def engine_file(made: Written) -> Path:
    return made.folder / "model.pt2"


def fed(path: str, batch: dict[str, Tensor]) -> Tensor:
    kind, _, name = path.partition(".")
    if kind == "embedding":
        return batch["ids"]
    return batch["u" if conftest.per_tensor_affine(TABLE[name]) else "x"]


@pytest.mark.parametrize("path", PATHS)
def test_without_recoup_every_scheme_computes_what_was_trained(
    path: str, programs: Written, ran: Ran
) -> None:
    module: Any = programs.converted.get_submodule(path)
    with torch.no_grad():
        trained, bound = common.expected(module, fed(path, ran.inputs))
    for found in (ran.here, ran.alone):
        assert ((found[path.partition(".")[2]].double() - trained).abs() <= bound).all()


@pytest.mark.parametrize("path", PATHS)
def test_on_integers_the_module_is_the_trained_one(path: str, programs: Written) -> None:
    module: Any = programs.converted.get_submodule(path)
    opened = lowering.opened(module, lowering.Processor())
    x = fed(path, exact(2, 3))
    with torch.no_grad():
        trained, bound = common.expected(module, x)
        assert ((opened(x).double() - trained).abs() <= bound).all()
    if isinstance(opened, lowering._IntegerLinear):
        # Its sums are exact: both scales and the bias round, and what is compared with has rounded inputs.
        weight = module.weight.codes.double() * module.weight.scale.double()
        bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().double()
        seen = module.input_quantizer(x).double()
        trained, inputs = seen @ weight.T + bias, seen.abs() @ weight.abs().T
        bound = 2**-24 * (4 * trained.abs() + 8 * bias.abs() + inputs)
        assert ((opened(x).double() - trained).abs() <= bound).all()


def test_a_processor_that_saturates_multiplies_the_same_integers(ran: Ran) -> None:
    integers = [name for name in TABLE if lowering.multiplies_integers(TABLE[name], conftest.WIDTH)]
    assert len(integers) >= 10
    for name in integers:
        assert torch.equal(ran.here[name], ran.alone[name]), name


def test_upper_and_lower_bits_make_the_product() -> None:
    codes = torch.randint(-128, 128, (5, 33), dtype=torch.int8)
    weight = torch.randint(-128, 128, (7, 33), dtype=torch.int8)
    assert torch.equal(lowering._product_of_parts(codes, weight).long(), codes.long() @ weight.long().T)


def test_everything_was_read_back(programs: Written) -> None:
    coded: list[Any] = [module for module in programs.converted.modules() if is_coded(module)]
    assert programs.parity.modules == len(coded) == len(PATHS)
    assert programs.parity.codes == sum(module.weight.codes.numel() for module in coded)
    assert programs.parity.scales == sum(module.weight.scale.numel() for module in coded)
    assert 0 < programs.parity.worst_module <= 1
    assert json.loads((programs.folder / "parity.json").read_text()) == programs.parity.to_json()
    assert {path.name for path in programs.folder.iterdir()} == {
        *("model.pt2", "parity.json", "artefact.json", "artefact.tensors")
    }


def test_the_width_of_a_code_is_the_one_that_preflight_tells(programs: Written) -> None:
    for name in TABLE:
        module: Any = programs.converted.get_submodule(f"linear.{name}")
        held = dict(lowering.opened(module, lowering.Processor()).named_buffers())
        codes = next(held[key] for key in ("codes", "weight.codes") if key in held)
        width = TARGETS["pytorch"].width(module.scheme, type(module))
        assert 8 * codes.numel() == width * module.weight.codes.numel(), name


def test_batch_and_length_are_free(engine: PytorchModel) -> None:
    for batch, tokens in ((1, 1), (1, 7), (4, 2)):
        found = engine(**noise(batch, tokens))
        assert found["w8a8"].shape == found.w4a16.shape == (batch, tokens, conftest.FEATURES)


@pytest.mark.parametrize("name", ["w2a16-g16", "w3a16", "w4a16-g128", "w8a16", "affine-3-bits-per-token"])
def test_packed_rows_are_read_by_other_code(name: str, programs: Written) -> None:
    weight: Codes = programs.converted.get_submodule(f"linear.{name}").weight  # pyright: ignore
    packed = lowering.pack(weight).numpy()
    assert packed.shape[1] == -(-weight.codes.shape[1] * lowering.container_bits(weight.spec) // 8)
    assert (parity.read_codes(weight.spec, weight.codes.shape, packed) == weight.codes.numpy()).all()


# tiny models


def _scheme(row: Row) -> str:
    return "w8a8-ort-static" if row.name in ("cnn", "conv1d", "conv3d") else "w8a8"


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_tiny_models(row: Row, tmp_path: Path) -> None:
    model = row.build().eval()
    batch = row.batch(2)
    made = written(ptq(model, _scheme(row), [batch]), tmp_path / "out", batch)
    engine = TARGETS["pytorch"].load(tmp_path / "out")
    for other in (row.batch(1), row.batch(3)):
        with torch.no_grad():
            trained, found = call(made.converted, other), call(engine, other)
            prepared = call(made.model.eval(), other)
        # one code that falls the other way moves an output by no more than quantizing does at all
        assert relative_rms(named_rows(trained), named_rows(found)) <= 0.05
        assert relative_rms(named_rows(trained), named_rows(prepared)) == 0


def test_a_convolution_keeps_its_weights_in_bytes(tmp_path: Path) -> None:
    x = images(2)
    model = ptq(Residual(), "w8a8-static", [x])
    export(model, tmp_path / "out", "pytorch", example=x)
    stored = PytorchModel(tmp_path / "out").exported.state_dict
    assert {n for n, t in stored.items() if t.dtype in (torch.int8, torch.uint8)} == {
        "stem.0.weight.codes", "depthwise.weight.codes", "grouped.weight.codes"
    }  # fmt: skip


def test_a_module_at_two_places_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(4, 256)
    made = written(ptq(Shared(), "w8a8", [x]), tmp_path / "out", x)
    assert made.parity.modules == 2
    assert len(PytorchModel(made.folder).calls) == 4
    with zipfile.ZipFile(made.folder / "model.pt2") as archive:
        assert sum(entry.file_size == 256 * 256 for entry in archive.infolist()) == 2


def test_a_model_cast_after_its_conversion_keeps_its_codes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))

    rules = {"first": "w8a8", "second": "w4a16", "third": "w4a8"}
    model = convert(ready(Two(), dict(rules), torch.randn(8, 64)))
    model = model.to(torch.bfloat16)
    x = torch.randn(4, 64).bfloat16()
    made = export(model, tmp_path / "out", "pytorch", example=x)
    assert made.modules == 3
    found = TARGETS["pytorch"].load(tmp_path / "out")(x)
    assert found.dtype == torch.bfloat16


def test_costs_are_measured_next_to_each_other(tmp_path: Path) -> None:
    x = torch.randn(2, 256)
    (tmp_path / "float").mkdir()
    target = TARGETS["pytorch"]
    target.write(nn.Sequential(nn.Linear(256, 256)), tmp_path / "float", x)
    export(ready(nn.Sequential(nn.Linear(256, 256)), {}, x), tmp_path / "small", "pytorch", example=x)
    first, second = target.costs((tmp_path / "float", tmp_path / "small"), x)
    assert second.bytes < first.bytes
    assert first.seconds
    assert 2**26 < second.peak_bytes < 2**34  # torch alone takes more than the first


# refusals


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _refused() -> dict[str, tuple[Scheme, str]]:
    integers, grouped = PRESETS["w8a8"], PRESETS["w4a16"]
    assert integers.inputs is not None
    half_range = replace(integers.inputs, scale_rule="half-range")
    return {
        "fp8": (PRESETS["fp8"], "e4m3 weights have no operator there"),
        "nvfp4": (preset("nvfp4a16"), "e2m1 weights have no operator there"),
        "q4_1": (PRESETS["q4_1"], "uint4 weights with offsets have no operator there"),
        "w4afp8": (PRESETS["w4afp8"], "e4m3 inputs with e8m23 scales have no operator there"),
        "q8_0": (PRESETS["q8_0"], "int8 inputs with e5m10 scales have no operator there"),
        "rule": (replace(grouped, inputs=half_range), "with scales by half-range are not built"),
        "blocks": (
            replace(grouped, inputs=replace(integers.inputs, granularity=Granularity(rows=None, columns=32))),
            "are not built; per tensor, and dynamic per token or in groups, are",
        ),
    }


@pytest.mark.parametrize("name", _refused())
def test_what_torch_cannot_compute_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    scheme, reason = _refused()[name]
    scheme = replace(scheme, name=name)
    recipe = Recipe.model_validate({"scheme": "w4a16", "rules": [{"match": "layer", "scheme": scheme}]})
    model = Tiny()
    plan = resolve(model, recipe)
    with pytest.raises(ValueError, match=f"layer: scheme '{name}' does not run in torch on a CPU") as error:
        preflight(model, plan, "pytorch")
    assert reason in str(error.value)
    assert "w8a8, w8a8-static, w8a8-ort, w4a8, w8a16, w4a16 and their relatives do" in str(error.value)
    assert "\n" not in str(error.value)
    if scheme.inputs is None:
        with pytest.raises(ValueError, match="does not run in torch"):
            export(prepare(model, plan), tmp_path / "out", "pytorch", example=torch.randn(2, 96))
    assert not list(tmp_path.iterdir())


def test_a_model_in_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer\.weight is neither float32 nor bfloat16; call model\.float"):
        writer.write(Tiny().half(), tmp_path, torch.randn(2, 96).half())


def test_what_cannot_be_traced_is_refused_in_one_line(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(ValueError, match=r"^pytorch: torch\.export cannot trace the model: [^\n]+$"):
        writer.write(Branching(), tmp_path, torch.randn(2, 96))
    with pytest.raises(ValueError, match="example holds values that are no tensors"):
        writer.write(Tiny(), tmp_path, (torch.randn(2, 96), 3))
    assert not list(tmp_path.iterdir())


def test_inputs_are_those_of_the_model(tmp_path: Path) -> None:
    writer.write(Tiny().eval(), tmp_path, {"x": torch.randn(2, 96)})
    engine = PytorchModel(tmp_path)
    x = torch.randn(3, 96)
    assert torch.equal(engine(x), engine(x=x))
    with pytest.raises(ValueError, match="the program's inputs are x; given y"):
        engine(y=x)
    with pytest.raises(FileNotFoundError, match="expected a program of torch"):
        PytorchModel(tmp_path / "nothing")


# files that are not what was written


Records = dict[str, bytes]


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Written:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))
    rules: dict[str, Scheme | str] = {"0": "w8a8", "3": "none"}
    return written(ready(model, rules, torch.randn(4, 64)), tmp_path_factory.mktemp("file") / "out",
                   torch.randn(4, 64))  # fmt: skip


def changed(file: Written, folder: Path, change: Callable[[Records], object]) -> Path:
    """The file with other records, and checksums that fit them."""
    with zipfile.ZipFile(file.folder / "model.pt2") as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    before = dict(records)
    change(records)
    assert records != before
    with zipfile.ZipFile(folder / "model.pt2", "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return folder


def record(records: Records, end: str) -> str:
    return next(name for name in records if name.endswith(end))


def edited(end: str, old: str, new: str) -> Callable[[Records], None]:
    """A change of some text."""

    def edit(records: Records) -> None:
        name = record(records, end)
        text = records[name].decode()
        assert old in text
        records[name] = text.replace(old, new, 1).encode()

    return edit


def added(name: str, content: bytes) -> Callable[[Records], None]:
    def add(records: Records) -> None:
        root = next(iter(records)).partition("/")[0]
        records[f"{root}/{name}"] = content

    return add


HOSTILE: dict[str, tuple[Callable[[Records], None], str]] = {
    "example inputs": (added("data/sample_inputs/model.pt", b"pickle"), "pickled example inputs"),
    "a custom object": (added("data/constants/custom_obj_0", b"pickle"), "the record archive/data/constants"),
    "an opaque object": (
        added("data/constants/opaque_obj_0", b"pickle"),
        "the record archive/data/constants",
    ),
    "legacy weights": (added("data/weights/model.pt", b"pickle"), "the record archive/data/weights/model.pt"),
    "a library": (added("data/aotinductor/model/a.so", b"ELF"), "the record archive/data/aotinductor"),
    "a pickled tensor": (
        edited("model_weights_config.json", '"use_pickle": false', '"use_pickle": true'),
        "a pickled tensor",
    ),
    "an expression": (
        edited("model.json", "Symbol('s", "__import__('os').system('s"),
        'expr_str "__import__',
    ),
    "an operator": (
        edited("model.json", "torch.ops.aten.relu.default", "torch.hub.load"),
        "target 'torch.hub",
    ),
    "a file's operator": (
        edited("model.json", "torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"),
        "target 'torch.ops.aten.from_file",
    ),
    "guards": (edited("model.json", '"guards_code": []', '"guards_code": ["print(1)"]'), "guards or types"),
    "a name that is code": (edited("model.json", '"name": "relu"', '"name": "relu;print(1)"'), "name 'relu;"),
    "a path that is code": (
        edited("model.json", '"buffer_name": "0.codes"', '"buffer_name": "0\\"), print(1"'),
        "buffer_name",
    ),
    "a tree of a type": (edited("model.json", "builtins.tuple", "collections.defaultdict"), "in_spec"),
    "metadata": (edited("model.json", '"metadata": {}', '"metadata": {"a": "b"}'), "metadata"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_would_execute_something_is_not_loaded(
    name: str, file: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, what = HOSTILE[name]
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch saw the file"))
    with pytest.raises(ValueError, match="which a file of recoup does not; it is not loaded") as error:
        PytorchModel(changed(file, tmp_path, change))
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_in_a_file_is_pickled_and_no_source_is_named(file: Written) -> None:
    with zipfile.ZipFile(file.folder / "model.pt2") as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert not records[record(records, "sample_inputs/model.pt")]
    assert not any(content.startswith((b"\x80\x02", b"PK")) for content in records.values())
    assert b"stack_trace" not in records[record(records, "model.json")]
    assert str(Path(__file__).parent).encode() not in b"".join(records.values())


@pytest.mark.parametrize("name", ["cut", "flipped", "empty", "no bytes of a tensor", "no notes"])
def test_a_damaged_file_is_a_clear_error(name: str, file: Written, tmp_path: Path) -> None:
    content = bytearray((file.folder / "model.pt2").read_bytes())
    if name == "cut":
        content = content[: len(content) // 2]
    elif name == "flipped":
        stored = PytorchModel(file.folder).exported.state_dict["0.codes"].numpy().tobytes()
        content[content.index(stored) + 5] ^= 1
    elif name == "empty":
        content.clear()
    if name in ("cut", "flipped", "empty"):
        (tmp_path / "model.pt2").write_bytes(content)
    else:
        end = "weights/weight_0" if "tensor" in name else "recoup.json"
        changed(file, tmp_path, lambda records: records.pop(record(records, end)))
    expected = "was not written by recoup" if name == "no notes" else "damaged"
    with pytest.raises(ValueError, match=rf"model\.pt2: {expected}[^\n]*$"):
        PytorchModel(tmp_path)


def test_what_this_torch_does_not_read_is_a_clear_error(file: Written, tmp_path: Path) -> None:
    changed(file, tmp_path, edited("model.json", "torch.ops.aten.relu.default", "torch.ops.aten.no_such.op"))
    with pytest.raises(ValueError, match=r"model\.pt2: torch .* cannot read it .*; export it again$"):
        PytorchModel(tmp_path)


def one_bit(name: str, place: int) -> Callable[[Records], None]:
    """Of one stored tensor."""

    def flip(records: Records) -> None:
        config = json.loads(records[record(records, "model_weights_config.json")])["config"]
        stored = record(records, "weights/" + config[name]["path_name"])
        content = bytearray(records[stored])
        content[place] ^= 1
        records[stored] = bytes(content)

    return flip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.codes", r"^0: the codes read back from the file differ from the trained ones at \(0, 5\)"),
        ("0.scale", "^0: the scale read back from the file differ"),
        ("2.weight.codes", r"^2: the codes read back from the file differ from the trained ones at \(0, 5\)"),
        ("2.weight.scale", "^2: the scale read back from the file differ"),
    ],
)
def test_another_code_or_scale_is_caught(name: str, message: str, file: Written, tmp_path: Path) -> None:
    changed(file, tmp_path, one_bit(name, 5 if name.endswith("codes") else 0))
    with pytest.raises(ParityError, match=message):
        TARGETS["pytorch"].verify(file.converted, tmp_path, torch.randn(4, 64))


def test_another_bias_is_caught_by_the_modules_bound(file: Written, tmp_path: Path) -> None:
    changed(file, tmp_path, one_bit("0.bias", 2))
    with pytest.raises(ParityError, match=r"^0: the program's output is .* times its bound"):
        TARGETS["pytorch"].verify(file.converted, tmp_path, torch.randn(4, 64))


def test_another_float_layer_is_caught_end_to_end(file: Written, tmp_path: Path) -> None:
    def change(records: Records) -> None:
        for place in range(3, 64 * 3 * 4, 4):
            one_bit("3.weight", place)(records)

    changed(file, tmp_path, change)
    with pytest.raises(ParityError, match=r"^in torch\.export the outputs differ from the trained model's"):
        TARGETS["pytorch"].verify(file.converted, tmp_path, torch.randn(4, 64))


def test_a_file_of_another_plan_is_caught(file: Written, tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))
    x = torch.randn(4, 64)
    export(ready(other, {"0": "w8a8", "2": "none", "3": "none"}, x), tmp_path / "out", "pytorch", example=x)
    with pytest.raises(ParityError, match=r"quantizes other modules than the plan: 2"):
        TARGETS["pytorch"].verify(file.converted, tmp_path / "out", x)


def test_a_product_in_float_where_the_plan_says_integers_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 64)
    model = ready(nn.Sequential(nn.Linear(64, 64)), {"0": "w8a8"}, x)
    monkeypatch.setattr(lowering, "multiplies_integers", lambda *_: False)
    with pytest.raises(ParityError, match=r"^0: its codes are used by"):
        export(model, tmp_path / "out", "pytorch", example=x)
    assert not list(tmp_path.iterdir())
