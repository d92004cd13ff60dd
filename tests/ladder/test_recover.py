"""Which rung is taken, what is kept, and what a run leaves in its folder."""

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recoup import Plan, Recipe, Result, Rule, Samples, calibrate, prepare, ptq, recover, resolve
from recoup.engines.onnxruntime import OnnxModel, size_bytes
from recoup.nn import FakeQuantizer
from tests.models import Tied, ids

from .conftest import Classifier, batches, labels, recipe, scripted
from .stand_in import SLOWER, alone

climb = importlib.import_module("recoup.ladder.climb")
ladder = importlib.import_module("recoup.ladder.ladder")
FILES = {"recipe.yaml", "plan.json", "metrics.jsonl", "report.md", "report.html", "run.json"}


def climbed(
    model: nn.Module, folder: Path, evaluate: Any, given: Recipe | None = None, **more: Any
) -> Result:
    given = given or recipe()
    return recover(
        model, given, calibration=batches(4), train=batches(8), evaluate=evaluate, folder=folder, **more
    )


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("this was not to be called")


@pytest.mark.usefixtures("quick")
def test_it_stops_at_the_first_rung_that_passes(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(climb, "train_under_quantization", never)
    evaluate = scripted(100, 99, 98)
    result = climbed(model, tmp_path / "run", evaluate)
    assert (result.outcome, result.rung) == ("passed", "rtn")
    assert [rung.name for rung in result.record.rungs] == ["rtn"]
    assert result.verdicts[0].candidate == 98 / 100  # of the file, not of the model in memory
    assert evaluate.models[0] is evaluate.models[1] is model
    assert evaluate.models[2] is not model
    assert not evaluate.left


@pytest.mark.usefixtures("quick")
def test_it_goes_on_to_training_when_it_has_to(model: Classifier, tmp_path: Path) -> None:
    before = model.up.weight.clone()
    result = climbed(model, tmp_path / "run", scripted(100, 50, 52, 99, 99))
    assert (result.outcome, result.rung) == ("passed", "qat")
    assert [rung.outcome for rung in result.record.rungs] == ["failed", "failed", "passed"]
    assert [entry["step"] for entry in result.record.curve] == [0, 1, 2, 3]
    assert "held_out" in result.record.curve[0]
    assert not torch.equal(model.up.weight, before)
    assert set(result.record.layer_errors) == {"rtn", "mse", "qat"}
    assert events(tmp_path / "run") == [
        "baseline",
        "rung",
        "rung",
        *["train"] * 4,
        "rung",
        "export",
        "artefact",
    ]


@pytest.mark.usefixtures("quick")
def test_when_nothing_passes_nothing_is_exported(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "export", never)
    result = climbed(model, tmp_path / "run", scripted(100, 50, 52, 55))
    assert (result.outcome, result.rung, result.artefact) == ("failed", "qat", None)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    found = run_json(tmp_path / "run")
    assert found["artefact"] is None
    assert found["outcome"] == found["verdicts"][0]["outcome"] == "failed"
    assert "Nothing was exported" in " ".join(found["notes"])
    assert "do not quantize it this way" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.usefixtures("quick")
def test_a_file_that_fails_is_not_called_passed(model: Classifier, tmp_path: Path) -> None:
    result = climbed(model, tmp_path / "run", scripted(100, 100, 25))
    assert (result.outcome, result.rung) == ("failed", "rtn")
    assert result.verdicts[0].candidate == 0.25
    assert run_json(tmp_path / "run")["outcome"] == "failed"


@pytest.mark.usefixtures("quick")
def test_few_samples_are_undecided_and_exported(model: Classifier, tmp_path: Path) -> None:
    # 10 of 12 is a decrease of 17 %, but its interval reaches down to 0
    result = climbed(model, tmp_path / "run", scripted(12, 10, 10, 10, 10, samples=12))
    assert result.outcome == "undecided"
    assert [rung.name for rung in result.record.rungs] == ["rtn", "mse", "qat"]
    assert result.rung == "rtn"  # the first of equals: the cheapest
    assert result.artefact is not None
    assert (result.artefact / "model.pt").is_file()


def destroyed(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.usefixtures("quick")
def test_a_training_that_made_it_worse_is_not_kept(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(climb, "train_under_quantization", destroyed)
    before = {name: value.clone() for name, value in model.named_parameters()}
    result = climbed(model, tmp_path / "run", scripted(100, 50, 52, 25))
    assert (result.outcome, result.rung) == ("failed", "mse")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(("right", "best"), [((100, 52, 50), "rtn"), ((100, float("nan"), 50), "mse")])
@pytest.mark.usefixtures("quick")
def test_training_starts_from_the_better_calibration(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: Any, best: str
) -> None:
    scales: dict[str, torch.Tensor] = {}

    def look(name: str) -> Callable[..., Any]:
        original = getattr(climb, name)

        def spy(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if name == "train_under_quantization":
                scales["at the start of training"] = model.up.weight_quantizer.scale.clone()
                return model
            original(model, *args, **kwargs)
            scales["rtn" if kwargs["observer"] == "minmax" else "mse"] = (
                model.up.weight_quantizer.scale.clone()
            )
            return model

        return spy

    for name in ("calibrate", "train_under_quantization"):
        monkeypatch.setattr(climb, name, look(name))
    result = climbed(model, tmp_path / "run", scripted(*right, 40))
    assert result.rung == best
    assert not torch.equal(scales["rtn"], scales["mse"])
    assert torch.equal(scales["at the start of training"], scales[best])
    assert torch.equal(model.up.weight_quantizer.scale, scales[best])


@pytest.mark.usefixtures("quick")
def test_training_alone_calibrates_first_and_keeps_a_batch_to_train_on(
    model: Classifier, tmp_path: Path
) -> None:
    given = recipe("w8a8-static", rungs=["qat"], train={"steps": 2, "held_out": 0.9})
    result = recover(model, given, calibration=batches(4), train=batches(2), folder=tmp_path / "run",
                     evaluate=scripted(100, 100, 100))  # fmt: skip
    assert (result.outcome, result.rung) == ("passed", "qat")


@pytest.mark.usefixtures("quick")
def test_plain_floats_are_undecided_unless_the_gate_asks_for_no_interval(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": 0.9}

    given = recipe(rungs=["rtn"])
    assert climbed(Classifier(), tmp_path / "1", evaluate, given).outcome == "undecided"
    gate = {"metric": "accuracy", "max_decrease": "10%", "interval": "none"}
    assert climbed(Classifier(), tmp_path / "2", evaluate, recipe(gates=[gate])).outcome == "passed"


@pytest.mark.usefixtures("quick")
def test_a_known_baseline_is_not_measured_again(model: Classifier, tmp_path: Path) -> None:
    evaluate = scripted(100, 100)
    result = climbed(
        model, tmp_path / "run", evaluate, baseline={"accuracy": [1] * 100}, facts={"data": "mine"}
    )
    assert result.outcome == "passed"
    assert len(evaluate.models) == 2
    assert run_json(tmp_path / "run")["facts"]["data"] == "mine"


# --- one run for real -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(fitted_state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    data = batches(8, 64)

    def evaluate(model: nn.Module) -> Samples:
        with torch.no_grad():
            right = [model(**b)["logits"].argmax(dim=1) == labels(b["x"]) for b in data]
        return Samples({"accuracy": torch.cat(right).numpy()})

    model = Classifier()
    model.load_state_dict(fitted_state)
    folder = tmp_path_factory.mktemp("real") / "run"
    plan, said = resolve(model, "w4a8"), list[str]()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        alone(patch)
        warnings.filterwarnings(*SLOWER.split(":"))
        result = climbed(model, folder, evaluate, recipe("w4a8"), say=said.append, title="a classifier")
    return {"result": result, "folder": folder, "evaluate": evaluate, "plan": plan, "said": said}


def test_the_folder_holds_all_that_was_promised(real: dict[str, Any]) -> None:
    folder: Path = real["folder"]
    assert real["result"].outcome == "passed"
    assert {path.name for path in folder.iterdir()} == FILES | {"artefact"}
    assert {path.name for path in (folder / "artefact").iterdir()} == {
        *("model.onnx", "parity.json", "artefact.json", "artefact.tensors")
    }
    assert Recipe.load(folder / "recipe.yaml") == recipe("w4a8")
    assert Plan.from_json(json.loads((folder / "plan.json").read_text())) == real["plan"]
    assert events(folder) == ["baseline", "rung", "export", "artefact"]
    assert "passed" in (folder / "report.md").read_text()
    assert "a classifier" in (folder / "report.html").read_text()
    assert any("rung rtn" in line for line in real["said"])


def test_run_json_says_what_was_measured_on_the_file(real: dict[str, Any]) -> None:
    found, folder = run_json(real["folder"]), real["folder"]
    assert (found["outcome"], found["rung"], found["scheme"], found["target"]) == (
        "passed",
        "rtn",
        "w4a8",
        "onnx",
    )
    again = Samples.of(real["evaluate"](OnnxModel(folder / "artefact")))
    assert found["artefact"]["metrics"] == again.summary()
    assert found["artefact"]["bytes"] == size_bytes(folder / "artefact")
    assert found["artefact"]["latency_seconds"] > 0
    assert found["artefact"]["peak_bytes"] > 2**20
    assert found["artefact"]["batch"] == "32 x 32"
    assert found["artefact"]["float"]["bytes"] > 2 * WEIGHTS * 4
    assert found["baseline"] == {"accuracy": found["verdicts"][0]["baseline"]}
    assert found["baseline"]["accuracy"] > 0.8
    (verdict,) = found["verdicts"]
    assert verdict["candidate"] == again.summary()["accuracy"]
    assert verdict["outcome"] == "passed"
    assert verdict["lo"] <= verdict["change"] <= verdict["hi"]
    assert found["seconds"] > 0


WEIGHTS = 32 * 32


def test_the_facts_tell_how_to_repeat_it(real: dict[str, Any], fitted_state: dict[str, torch.Tensor]) -> None:
    facts = run_json(real["folder"])["facts"]
    assert facts["seed"] == "0"
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"] == torch.__version__
    assert facts["numpy"] == np.__version__
    assert {"onnx", "onnxruntime", "accelerate", "recoup", "python", "machine", "parity"} <= set(facts)
    of = importlib.import_module("recoup.ladder.facts").facts_of
    again, data = Classifier(), batches(1)
    again.load_state_dict(fitted_state)
    assert len(facts["sha256 of the float weights"]) == 64
    assert (
        of(again, data, (), recipe())["sha256 of the float weights"] == facts["sha256 of the float weights"]
    )
    other = Classifier()
    assert (
        of(other, data, (), recipe())["sha256 of the float weights"] != facts["sha256 of the float weights"]
    )
    hashes = [
        of(again, d, (), recipe())["sha256 of the calibration batches"] for d in (data, data, batches(1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_report_goes_elsewhere_too(real: dict[str, Any], tmp_path: Path) -> None:
    real["result"].report(tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text() == (real["folder"] / "report.html").read_text()


def test_a_lattice_without_a_cpu_engine_goes_up_the_ladder_and_is_labelled(
    model: Classifier, tmp_path: Path
) -> None:
    given = recipe("mxfp4", export={"target": "onnx-qdq"}, rungs=["rtn"])
    result = climbed(model, tmp_path / "run", scripted(100, 99, 98), given)
    assert (result.outcome, result.rung) == ("passed", "rtn")
    found = run_json(tmp_path / "run")
    assert "latency_seconds" not in found["artefact"] or found["artefact"]["latency_seconds"] is None
    report = (tmp_path / "run" / "report.md").read_text()
    assert "computed by onnx.reference (no CPU engine)" in report
    assert "no engine for such a file is installed on a CPU" in report


# --- what is refused, and what an interruption leaves ---------------------------------------------------


def test_what_cannot_be_run_is_refused_before_anything_is_written(model: Classifier, tmp_path: Path) -> None:
    cases: list[tuple[Recipe, dict[str, Any], str]] = [
        (recipe(gates=[]), {}, "the recipe has no gates, so nothing could pass"),
        (recipe(), {"train": batches(1)}, "the rung qat needs at least 2 training batches"),
        (recipe("mxfp8"), {}, r"up: scheme 'mxfp8' does not run in onnxruntime"),
        (recipe("w4a16-g24"), {}, "32 columns cannot be cut into groups of 24"),
        (recipe(export={"target": "onyx"}), {}, "no export target 'onyx'; did you mean 'onnx'"),
        *(
            (recipe(export={"to": to}), {}, f"export.to: '{to}' is where the run itself lies; name another")
            for to in ("unfinished/steps", "run.json", "report.html/x", ".artefact-x")
        ),
        (recipe(export={"tensor_parallel": 2}), {}, "2 devices asked, this target runs on one; leave it out"),
    ]
    for given, more, message in cases:
        keywords: dict[str, Any] = {"calibration": batches(2), "train": batches(2)} | more
        with pytest.raises(ValueError, match=message):
            recover(model, given, evaluate=never, folder=tmp_path / "run", **keywords)
        assert not list(tmp_path.iterdir())


class Stateful(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.counting = Counting()


class Counting(nn.Module):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None: ...


REFUSED: list[tuple[type[nn.Module], dict[str, Any], str]] = [
    (
        Classifier,
        {"train": {"loss": "task"}},
        "the loss needs loss; the model returns logits: give the batches",
    ),
    (Classifier, {"train": {"activation_checkpointing": True}}, "Classifier has no layers that transformers"),
    (Classifier, {"rungs": ["gptq"], "weight_ranges": "dynamic"}, "its scales follow the weight, and gptq"),
    (Stateful, {}, r"counting\._extra_state: state of type int"),
    (Stateful, {"rungs": ["gptq"]}, r"counting\._extra_state: state of type int"),
    (Stateful, {"rungs": ["bias"]}, r"counting\._extra_state: state of type int"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("build", "fields", "message"), REFUSED)
def test_a_rung_that_cannot_be_climbed_is_refused_before_the_baseline(
    build: type[nn.Module], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = build()
    for part in (None, "ptq") if fields.get("rungs") is None else (None,):
        with pytest.raises(ValueError, match=message):
            climbed(model, tmp_path / "run", never, recipe(**fields), part=part)
    assert not list(tmp_path.iterdir())
    assert not any(isinstance(module, FakeQuantizer) for module in model.modules())


@pytest.mark.parametrize("rung", ["gptq", "bias"])
def test_some_rungs_want_batches_of_one_shape_at_once(model: Classifier, rung: str, tmp_path: Path) -> None:
    data = [*batches(1), {"x": torch.randn(32, 2, 32)}]
    with pytest.raises(ValueError, match=f"{rung}: the calibration batches have different shapes"):
        recover(model, recipe(rungs=[rung]), calibration=data, evaluate=never,
                folder=tmp_path / "run")  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_folder_belongs_to_one_finished_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    climbed(Classifier(), folder, scripted(100, 100, 100))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"run: this run is done; remove the folder to run it again"):
        climbed(Classifier(), folder, never)
    with pytest.raises(ValueError, match=r"run: holds a run of another recipe; choose another folder"):
        climbed(Classifier(), folder, never, recipe("w4a8"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other: is not empty and holds no run; choose another folder"):
        climbed(Classifier(), tmp_path / "other", never)
    with pytest.raises(ValueError, match=r"notes\.txt: is a file; a run needs a folder"):
        climbed(Classifier(), tmp_path / "other" / "notes.txt", never)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        OSError, match=r"run: cannot be written \(.*file is no folder to write in\); choose another"
    ) as error:
        climbed(Classifier(), tmp_path / "file" / "run", never)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("quick")
def test_channels_are_balanced_after_the_baseline(model: Classifier, tmp_path: Path) -> None:
    model.up.weight.data[3] *= 64  # a ReLU hands it on
    before, said = model.up.weight.detach().clone(), list[str]()
    evaluate = scripted(100, 99, 99)
    result = climbed(model, tmp_path / "run", evaluate, recipe(smooth=True), say=said.append)
    assert said[1:4] == ["float: accuracy 1", "balancing channels", "rung rtn"]
    assert torch.equal(result.model.get_parameter("up.weight")[3], before[3] / 8)
    assert "The sizes of channels were balanced before anything was quantized." in result.record.notes


def test_ptq_is_resolve_prepare_calibrate() -> None:
    data = batches(3)
    model, other = Classifier(), Classifier()
    other.load_state_dict(model.state_dict())
    assert ptq(model, "w8a8-static", data) is model
    calibrate(prepare(other, resolve(other, "w8a8-static")), data, observer="mse")
    found, expected = model.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    minmax = ptq(
        Classifier(), recipe("w4a16", rules=[{"match": "down", "scheme": "none"}]), data, observer="minmax"
    )
    assert [name for name, m in minmax.named_modules() if isinstance(m, FakeQuantizer)] == [
        "up.weight_quantizer"
    ]


def test_ptq_unties_where_a_recipe_asks() -> None:
    model, batch = Tied(), ids()
    ptq(model, Recipe(scheme="w8a16", rules=(Rule(match="tokens", scheme=None),), untie=True), [batch])
    assert model.lm_head.weight is not model.tokens.weight
