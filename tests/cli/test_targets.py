"""Every target from the command line: what it refuses, first of all, and a whole run of a tiny model."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import yaml

from recoup.cli import _run
from recoup.export import TARGETS
from tests.cli.test_cli import tree
from tests.export.gguf_models import small
from tests.export.test_gguf_vocabulary import WORDS, byte_level, fast
from tests.ladder.conftest import quick
from tests.ladder.stand_in import SLOWER, alone

__all__ = ["quick"]  # a fixture

TASK = """
from pathlib import Path
import torch

Path("trace").touch()

def parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 8))
    batches = [{"input": torch.randn(16, 96)}]
    labels = model(**batches[0]).argmax(dim=1)

    def evaluate(model):
        with torch.no_grad():
            return {"accuracy": (model.eval()(**batches[0]).argmax(dim=1) == labels).tolist()}

    return {"model": model, "calibration": batches, "evaluate": evaluate}

def llama():
    from tests.export.gguf_models import batch, small

    model = small("llama", hidden_size=96, intermediate_size=96, attention_bias=False, mlp_bias=False)
    return {"model": model, "calibration": [batch(16)], "evaluate": lambda model: {"accuracy": [1]}}

def tied():
    from tests.models import Tied, ids

    return {"model": Tied(), "calibration": [ids(16)], "evaluate": lambda model: {"accuracy": [1]}}
"""
LLAMA = {"name": "custom", "entry": "target_task:llama"}
TIED = {"name": "custom", "entry": "target_task:tied"}
Fields = dict[str, Any]


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a recipe whose task leaves a trace when it is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "target_task", raising=False)
    (tmp_path / "target_task.py").write_text(TASK)

    def write_recipe(**fields: Any) -> None:
        data: Fields = {
            "task": {"name": "custom", "entry": "target_task:parts"},
            "scheme": "w4a16",
            "rungs": ["rtn"],
            "calibration": {"samples": 16},
            "gates": [{"metric": "accuracy", "max_decrease": "20%"}],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data | fields))

    return write_recipe


def line_of(command: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert _run([command, "recipe.yaml", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


both = pytest.mark.parametrize("command", ["run", "explain"])
PACKAGES = [(target, package) for target, found in TARGETS.items() for package in found.packages]


@both
@pytest.mark.parametrize(("target", "package"), PACKAGES, ids=lambda value: value)
def test_a_missing_package_is_the_first_thing_that_is_said(
    command: str,
    target: str,
    package: str,
    custom: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    custom(export={"target": target})
    monkeypatch.setitem(sys.modules, package, None)
    extra = TARGETS[target].extra
    assert line_of(command, capsys) == (
        f"recoup: the {target} target needs {package}: pip install 'recoup[{extra}]'"
    )
    assert not Path("trace").exists()
    assert not Path("runs").exists()


WRONG: dict[str, tuple[Fields, str]] = {
    "a misspelt target": ({"export": {"target": "onxx"}}, "no export target 'onxx'; did you mean 'onnx'?"),
    "fp4 in onnxruntime": ({"scheme": "mxfp4"}, "0: scheme 'mxfp4' does not run in onnxruntime on a CPU"),
    "groups of 48 in GGUF": (
        {"task": LLAMA, "scheme": "w4a16-g48", "export": {"target": "gguf"}},
        "q_proj: scheme 'w4a16-g48': no type of llama.cpp holds int4 per g48, static (half-range) weights"),
    "an architecture that llama.cpp has not": (  # another scheme would not help
        {"scheme": "w4a16-g48", "export": {"target": "gguf"}}, "no llama.cpp architecture for Sequential"),
    "a model that is no transformers'": (
        {"export": {"target": "compressed-tensors"}}, "bring a PreTrainedModel, or export to onnx"),
    "fp8 in torch": (
        {"scheme": "fp8", "export": {"target": "pytorch"}}, "0: scheme 'fp8' does not run in torch on"),
    "several devices": (
        {"export": {"tensor_parallel": 4}}, "export.tensor_parallel: 4 devices asked, this target runs"),
    "another reader": (
        {"export": {"consumer": "vllm"}}, "export.consumer: vllm asked, this target has one reader; leave"),
    "a GPU of nobody": (
        {"export": {"gpu": "hopper"}}, "export.gpu: hopper asked without a reader; name one"),
    "a GPU that leaves inputs in float": (
        {"task": LLAMA, "scheme": "fp8", "export": {
            "target": "compressed-tensors", "consumer": "vllm", "gpu": "ampere"}},
        "vllm 0.33 leaves in float the inputs that training quantized"),
    "a cache in a model that has none": (
        {"kv": "fp8"}, "kv: a Sequential is no transformers model that generates text, so it has no"),
    "keys and values of 4 bits": ({"kv": "fp4"}, "kv: no spec of keys and values 'fp4'; there are fp8"),
    "nothing to untie": ({"untie": True}, "untie: no two modules share a Parameter, nothing is tied; leave"),
    "no devices": ({"export": {"tensor_parallel": 0}}, "export.tensor_parallel: input should be greater"),
    **{
        f"a place outside, {place}": (
            {"export": {"to": place}}, f"export.to: {place!r} is not in the run's folder; name")
        for place in ("../out", "a/../../out", "/tmp/out", "~/out", "C:\\out", "\\\\server\\out", ".", "")
    },
}  # fmt: skip


@both
@pytest.mark.parametrize("name", WRONG)
def test_what_a_target_cannot_do_is_one_line(
    command: str, name: str, custom: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, message = WRONG[name]
    custom(**fields)
    assert message in line_of(command, capsys)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "target_task.py",
        "recipe.yaml",
        "trace",
        "__pycache__",
    }


@pytest.mark.filterwarnings("default:onnx. codes of 3 bits")
@pytest.mark.usefixtures("quick")
def test_three_bits_in_fields_of_four_are_said_once(
    custom: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    custom(scheme="w3a16", gates=[{"metric": "accuracy", "max_decrease": "90%"}])
    warning = (
        "recoup: warning: onnx: codes of 3 bits lie in fields of 4 (0): 96 B more than their bits; "
        "4 bits would take no more"
    )
    for command in ("explain", "run"):
        assert _run([command, "recipe.yaml"]) == 0
        said = capsys.readouterr()
        assert said.err.splitlines() == [warning]
        assert ("MatMulNBits, in fields of 4 bits" in said.out) == (command == "explain")


def test_explain_unties_where_the_recipe_says_so(
    custom: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    custom(task=TIED, untie=True, rules=[{"match": "lm_head", "scheme": "w8a16"}])
    assert _run(["explain", "recipe.yaml"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if "w8a16" in line] == ["lm_head.weight"]
    assert said[-1].startswith(
        "untied: lm_head.weight from tokens.weight; takes 16,384 bytes more before and "
    )


def test_a_folder_that_holds_an_export_is_no_place_for_a_run(
    custom: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    custom()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"somebody's")
    before = tree(tmp_path / "out")
    assert "out: is not empty and holds no run; choose another" in line_of("run", capsys, "--to", "out")
    assert tree(tmp_path / "out") == before


def test_libraries_that_are_imported_add_no_words(custom: Callable[..., None]) -> None:
    """As torchao does, when transformers imports it."""
    custom(scheme="fp8", export={"target": "pytorch"})
    for name in ("torchao.ops", "torch.utils._pytree"):
        with Path("target_task.py").open("a") as file:
            file.write(f"\nimport logging\nlogging.getLogger({name!r}).warning('no such extension')\n")
    done = subprocess.run(
        [sys.executable, "-c", "from recoup.cli import main; main()", "explain", "recipe.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("recoup: 0: scheme 'fp8' does not run in torch")


# --- a whole run ----------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, str]] = {
    "gguf": ("q8_0", "model.gguf"),
    "compressed-tensors": ("w8a16", "model.safetensors"),
}


@pytest.mark.filterwarnings(SLOWER)
@pytest.mark.parametrize("target", RUNS)
def test_a_recipe_becomes_a_measured_artefact(
    target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(jaxtyping.config.__dict__, "jaxtyping_disable", True)
    tokenizer = fast(byte_level([], regex=True))
    small("qwen2", vocab_size=WORDS).save_pretrained("model")
    tokenizer.save_pretrained("model")
    for part, word in (("train", "we hope that it is so"), ("test", "hello, two spaces")):
        Path(f"{part}.txt").write_text(" ".join(f"{word} {number}" for number in range(60)))
    scheme, file = RUNS[target]
    recipe = {
        "task": {
            "name": "causal-lm", "model": "./model", "context": 16, "batch_size": 4,
            "data": {"train": "train.txt", "test": "test.txt"},
        },
        "scheme": scheme,
        "calibration": {"samples": 4},
        "rungs": ["rtn"],
        "gates": [{"metric": "perplexity", "max_increase": "5%"}],
        "export": {"target": target, "to": "shipped/model"},
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert _run(["explain", "recipe.yaml"]) == 0
    explained = capfd.readouterr().out
    assert {"gguf": "Q8_0", "compressed-tensors": "pack-quantized"}[target] in explained
    assert _run(["run", "recipe.yaml"]) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == "passed: rtn; the report is runs/recipe/report.html"
    assert Path("runs/recipe/shipped/model", file).is_file()
    standing = json.loads(Path("runs/recipe/run.json").read_text())
    assert standing["artefact"]["metrics"]["perplexity"] == pytest.approx(
        standing["rungs"][0]["metrics"]["perplexity"], rel=0.01
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "model",
        "train.txt",
        "test.txt",
        "recipe.yaml",
        "runs",
    }


@pytest.mark.filterwarnings(SLOWER)
def test_a_recipe_becomes_a_program_of_torch(
    custom: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch)
    monkeypatch.setitem(jaxtyping.config.__dict__, "jaxtyping_disable", True)
    there = TARGETS["pytorch"]
    costs = partial(
        there.costs, peak_bytes=lambda *_: 1
    )  # two processes; tests/export/test_pytorch.py has them
    monkeypatch.setitem(TARGETS, "pytorch", replace(there, costs=costs))
    custom(scheme="w8a8", export={"target": "pytorch"})
    assert _run(["explain", "recipe.yaml"]) == 0
    assert "_int_mm" in capsys.readouterr().out
    assert _run(["run", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed: rtn; the report is runs/recipe/report.html"
    assert Path("runs/recipe/artefact/model.pt2").is_file()
