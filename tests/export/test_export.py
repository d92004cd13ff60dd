"""The verb: what it refuses, what it leaves behind, and what it takes as a model and a batch."""

import copy
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup import Recipe, Scheme, convert, export, prepare, ptq, resolve
from recoup.engines.onnxruntime import OnnxModel
from recoup.export import TARGETS, Parity, ParityError, preflight
from recoup.nn import Codes
from recoup.numerics import per_group
from recoup.schemes import PRESETS

from .conftest import Exported

writer = importlib.import_module("recoup.export.onnx")
verb = importlib.import_module("recoup.export.export")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(96, 8)
        self.table = nn.Embedding(4, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def small() -> nn.Module:
    """Prepared, calibrated."""
    return ptq(Tiny(), "w4a16", [torch.randn(2, 96)])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A target that writes a file and proves nothing: for what is not about ONNX. The folders written."""
    folders: list[Path] = []

    def write(model: nn.Module, folder: Path, example: Any) -> None:
        (folder / "model.onnx").write_text("a model")
        folders.append(folder)

    proven = Parity(modules=1, codes=1, scales=1, worst_module=0.0, end_to_end=0.0)
    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=write, compare=lambda *_: proven))
    return folders


UNSUPPORTED: dict[str, tuple[Scheme | str, str, str]] = {
    "mxfp8": ("mxfp8", "layer", "e4m3 weights with e8m0 scales"),
    "mxfp4": ("mxfp4", "layer", "e2m1 weights with"),
    "nvfp4": ("nvfp4", "layer", "e2m1 weights with"),
    "mxfp6": ("mxfp6", "layer", "e2m3 weights with"),
    "groups of 24": ("w4a16-g24", "layer", "groups of a power of two from 16 up"),
    "groups of 8": ("w4a16-g8", "layer", "groups of a power of two from 16 up"),
    "2-bit weights and inputs in blocks of 16": ("w2a8-ort-g16", "layer", "groups of 32, 64 or 128"),
    "embedding per channel": (
        Scheme(name="rows", weights=PRESETS["w8a8"].weights), "table", "embeddings need integer weights in"),
    "blocks that are not the weights'": (
        replace(PRESETS["w4a8-ort"], name="mixed", weights=replace(PRESETS["w4a8-ort"].weights,
                                                                   granularity=per_group(16))),
        "layer", "inputs int8 per g32, dynamic (narrow) have no kernel there"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "path", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_the_engine_cannot_run_is_refused_before_any_work(
    scheme: Scheme | str, path: str, reason: str, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({"scheme": "w4a16", "rules": [{"match": path, "scheme": scheme}]})
    model = Tiny()
    plan = resolve(model, recipe)
    with pytest.raises(ValueError, match="does not run in onnxruntime") as error:
        preflight(model, plan, "onnx")
    message = str(error.value)
    assert message.startswith(f"{path}: scheme {plan.modules[path]!r}")
    assert reason in message
    runs = "w4a16, w4a8, w4a8-ort, w8a8, w8a8-ort, fp8" if path == "layer" else "w8a16, w4a16"
    assert f"{runs} and their relatives do" in message
    elsewhere = "; the target 'onnx-qdq' writes it for other engines, such as TensorRT"
    assert message.endswith(elsewhere) == (scheme != "mxfp6")
    assert "\n" not in message
    if path == "layer" and plan[path].inputs is None:
        prepare(model, plan)
        with pytest.raises(ValueError, match=r"layer: scheme .* does not run in onnxruntime"):
            export(model, tmp_path / "out", "onnx", example=torch.randn(2, 96))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["w4a16", "w2a8-ort", "w8a8-static"])
def test_preflight_lets_through_what_runs(name: str) -> None:
    preflight(Tiny(), resolve(Tiny(), name), "onnx")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("onxx", "did you mean 'onnx'"),
        ("safetensors", "this version writes onnx, onnx-qdq, compressed-tensors, pytorch, gguf"),
        ("ggufs", "did you mean 'gguf'"),
        ("compressed_tensors", "did you mean 'compressed-tensors'"),
    ],
)
def test_an_unknown_target_gets_the_nearest(name: str, hint: str, tmp_path: Path) -> None:
    message = f"no export target {name!r}; {hint}"
    with pytest.raises(ValueError, match=message):
        export(small(), tmp_path / "out", name)
    with pytest.raises(ValueError, match=message):
        preflight(Tiny(), resolve(Tiny(), "w4a16"), name)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, written: list[Path]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=rf"{name}: exists and is not empty; choose another folder"):
            export(small(), tmp_path / name, "onnx")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert not written


def test_an_empty_folder_is_filled(tmp_path: Path, written: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    export(small(), tmp_path / "out", "onnx")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.onnx", "parity.json", "artefact.json", "artefact.tensors")
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_nothing_is_left_behind_when_the_proof_fails(
    tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(trained: Any, folder: Path) -> Parity:
        assert (folder / "model.onnx").is_file()
        raise ParityError("layer: no")

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], compare=compare))
    with pytest.raises(ParityError, match="layer: no"):
        export(small(), tmp_path / "out", "onnx")
    assert written
    assert not list(tmp_path.iterdir())


def test_what_is_not_ready_is_refused(tmp_path: Path, written: list[Path]) -> None:
    example = torch.randn(2, 96)
    with pytest.raises(ValueError, match="nothing to convert: the model has no prepared modules"):
        export(Tiny(), tmp_path / "out", "onnx", example=example)
    model = prepare(Tiny(), resolve(Tiny(), "w8a8-static"))
    with pytest.raises(ValueError, match=r"layer\.input: its range is not known"):
        export(model, tmp_path / "out", "onnx", example=example)
    assert not written
    assert not list(tmp_path.iterdir())


def test_without_an_example_it_asks_for_one(tmp_path: Path, written: list[Path]) -> None:
    model = prepare(Tiny(), resolve(Tiny(), "w4a16"))
    with pytest.raises(ValueError, match=r"pass example=batch, or calibrate first"):
        export(model, tmp_path / "out", "onnx")
    export(model, tmp_path / "out", "onnx", example=torch.randn(1, 96))


class Processor:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("mine")


class Configured(Tiny):
    """A model with a config, as transformers' have."""

    def __init__(self, folder: str = "") -> None:
        super().__init__()
        self.config = type("Config", (), {"_name_or_path": folder})()


def test_a_processor_is_saved_into_the_folder(tmp_path: Path, written: list[Path]) -> None:
    model = ptq(Configured(), "w4a16", [torch.randn(2, 96)])
    export(model, tmp_path / "out", "onnx", processor=Processor())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"


PROVED = {"model.onnx", "parity.json", "artefact.json", "artefact.tensors"}


def test_a_processor_is_copied_from_the_models_folder(tmp_path: Path, written: list[Path]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "config.json", "model.safetensors"):
        (source / name).write_text(name)
    export(ptq(Configured(str(source)), "w4a16", [torch.randn(2, 96)]), tmp_path / "out", "onnx")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "vocab.txt", "config.json"} == found - PROVED


def test_a_processor_never_replaces_what_was_written(
    tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: nn.Module, folder: Path, example: Any) -> None:
        (folder / "config.json").write_text("of the artefact")

    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (source / name).write_text("of the float model")
    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=write))
    export(ptq(Configured(str(source)), "w4a16", [torch.randn(2, 96)]), tmp_path / "out", "onnx")
    assert (tmp_path / "out" / "config.json").read_text() == "of the artefact"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "of the float model"


@pytest.mark.parametrize("library", ["compressed_tensors", "transformers"])
def test_a_missing_library_names_the_extra(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = f"the compressed-tensors target needs {library}: pip install 'recoup\\[compressed-tensors\\]'"
    with pytest.raises(ImportError, match=message):
        preflight(Tiny(), resolve(Tiny(), "w4a16"), "compressed-tensors")
    with pytest.raises(ImportError, match=message):
        export(small(), tmp_path / "out", "compressed-tensors")


def test_a_model_that_was_not_loaded_takes_nothing_from_the_working_directory(
    tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text("of something else")
    with pytest.warns(UserWarning, match="no tokenizer or image processor; pass processor="):
        export(ptq(Configured(), "w4a16", [torch.randn(2, 96)]), "out", "onnx")
    assert {path.name for path in Path("out").iterdir()} == {
        *("model.onnx", "parity.json", "artefact.json", "artefact.tensors")
    }


def test_converted_before_or_by_export_the_stored_tensors_are_the_same(
    chain: Exported, tmp_path: Path
) -> None:
    export(convert(copy.deepcopy(chain.model)), tmp_path / "again", "onnx", example=torch.randn(3, 64))
    again = onnx.load(tmp_path / "again" / "model.onnx")
    first, second = (
        {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in file.graph.initializer}
        for file in (chain.file, again)
    )
    assert first == second
    assert any(name.endswith(".codes") for name in first)


class Returning(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.what(x, y)


def test_positional_batches_and_tuples(tmp_path: Path) -> None:
    model = Returning(lambda x, y: (x + y, x * y))
    writer.write(model, tmp_path, (torch.randn(2, 3), torch.randn(2, 3)))
    x, y = torch.randn(2, 5, 3)
    first, second = OnnxModel(tmp_path)(x, y).values()
    assert torch.equal(first, x + y)
    assert torch.equal(second, x * y)
    assert OnnxModel(tmp_path).outputs == ["0", "1"]
    assert model.training


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x, y: {"loss": x, "cache": [y]}, "output 'cache' is a list"),
        (lambda x, y: (x, None), "output '1' is a NoneType"),
        (lambda x, y: "text", "output '' is a str"),
    ],
)
def test_a_model_that_returns_more_than_tensors_is_refused(what: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"onnx: {message}; a file has only tensors as outputs"):
        writer.write(Returning(what), tmp_path, (torch.randn(2, 3), torch.randn(2, 3)))
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Without(nn.Module):
    """An operator that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT)


@pytest.mark.parametrize(
    ("inner", "reason"),
    [(Branching(), "Could not guard on data-dependent"), (Without(), "No ONNX function found for")],
    ids=["a branch on values", "an operator that ONNX has not"],
)
def test_a_model_that_cannot_be_traced_names_the_module(
    inner: nn.Module, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(96, 96)
            self.blocks = nn.ModuleList([nn.ReLU(), nn.Sequential(nn.ReLU(), inner)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](self.first(x)))

    model = ptq(Outer(), "w4a16", [torch.randn(2, 4, 96)])
    with pytest.raises(ValueError, match=r"onnx: blocks\.1\.1 \(") as error:
        export(model, tmp_path / "out", "onnx")
    message = str(error.value)
    assert message.startswith(f"onnx: blocks.1.1 ({type(inner).__name__}) cannot be traced: ")
    assert reason in message
    assert message.endswith("choose a target that does not trace (compressed-tensors, gguf)")
    assert "def forward" not in capsys.readouterr().err  # torch prints the graph
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


class Classifier(nn.Module):
    """Answers logits under that name, as transformers' classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(96, 96), nn.Linear(96, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.body(x)))}


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-ort-static"])
@pytest.mark.parametrize("target", ["onnx", "onnx-qdq"])
def test_classes_of_a_model_with_logits_are_compared(target: str, scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 96)
    parity = export(ptq(Classifier(), scheme, [x]), tmp_path / "out", target, example=x)
    assert parity.divergence is not None
    assert parity.divergence < 1e-9  # float32 sums: the square of 1e-6, and a few codes at ties
    assert parity.same_word == 1.0
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["divergence"] == parity.divergence


def test_what_multiplies_floats_is_named_by_node(chain: Exported) -> None:
    found = chain.parity.falls_back
    assert found is not None
    assert set(found.values()) == {
        "MatMulNBits of floats: codes are made float in the kernel, inputs are float32",
        "MatMulNBits of again: codes are made float in the kernel, inputs are float32",
        "MatMulNBits of tokens: codes are made float in the kernel, inputs are float32",
        "Gemm with head.weight: float32, as the recipe keeps it",
    }
    nodes = {node.name for node in chain.file.graph.node}
    assert set(found) <= nodes
    assert json.loads((chain.folder / "parity.json").read_text())["falls_back"] == found
    assert "in floats: 4 (parity.json names them)" in str(chain.parity)


def test_a_transformers_model_with_quantized_embeddings(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=8,
    )
    rules = {"embeddings.word_embeddings": "w8a16", "embeddings.position_embeddings": "w4a16"}
    rules["embeddings.token_type_embeddings"] = "w2a16"
    recipe = {"scheme": "w4a16", "rules": [{"match": m, "scheme": s} for m, s in rules.items()]}
    batch = bert_batch(2, 6)
    model = ptq(BertModel(config).eval(), Recipe.model_validate(recipe), [batch])
    parity = export(model, tmp_path / "out", "onnx", processor=Processor())
    assert parity.modules == 10
    engine, other = OnnxModel(tmp_path / "out"), bert_batch(3, 8)
    assert engine.inputs == list(batch)
    exact = copy.deepcopy(convert(copy.deepcopy(model))).double()
    for module in exact.modules():
        if isinstance(module, Codes):
            module.dtype = torch.float64
    with torch.no_grad():
        truth, prepared, found = exact(**other), model(**other), engine(**other)
    assert set(found) == {"last_hidden_state", "pooler_output"}
    for name in found:
        assert found[name].shape == truth[name].shape
        # Both are one function in float32, in another order of summation.
        assert rms(found[name] - truth[name]) <= 10 * rms(prepared[name] - truth[name])
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["modules"] == 10


def bert_batch(samples: int, tokens: int) -> dict[str, Tensor]:
    mask = torch.ones(samples, tokens, dtype=torch.int64)
    mask[0, tokens // 2 :] = 0
    return {"input_ids": torch.randint(0, 16, (samples, tokens)), "attention_mask": mask}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
