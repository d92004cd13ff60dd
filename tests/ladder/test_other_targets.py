"""An artefact that is slower than the float model: said in one line, with what is not, found by measuring."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn

from recoup import Recipe, resolve
from recoup.export import TARGETS
from recoup.ladder import outcome_of_part
from recoup.ladder.other_targets import advice, nearest
from recoup.ladder.standing import Trial
from recoup.validate import Cost
from tests.export.gguf_models import small, whole

from .conftest import WIDTH, Classifier, scripted
from .stand_in import COST, install
from .test_recover import climbed, events, never, run_json

other_targets = importlib.import_module("recoup.ladder.other_targets")


def costs(before: float | None, after: float | None) -> tuple[Cost, Cost]:
    """In milliseconds."""
    seconds = [None if value is None else value / 1000 for value in (before, after)]
    return replace(COST, seconds=seconds[0]), replace(COST, seconds=seconds[1])


PYTORCH = Trial(target="pytorch", scheme="w4a8", costs=costs(6, 5))
GGUF = Trial(target="gguf", scheme="q4_0", costs=costs(9, 3))
HERE = "in onnx the artefact is slower than the float model: 5 ms against 4 ms for a batch of 2 x 32; "
ADVICE: dict[str, tuple[tuple[Cost, Cost] | None, list[Trial], str | None]] = {
    "nothing was exported": (None, [], None),
    "nobody knows": (costs(None, None), [], None),
    "as fast": (costs(4, 4), [], None),
    "slower by noise": (costs(4, 4.05), [], None),
    "no other target": (costs(4, 5), [], HERE + "no other target that is installed here runs this model"),
    "the other cannot": (
        costs(4, 5), [Trial(target="gguf", refused="no")],
        HERE + "no other target that is installed here runs this model"),
    "the fastest is named": (
        costs(4, 5), [replace(PYTORCH, costs=costs(6, 3.5)), GGUF],
        HERE + "faster than float is gguf with q4_0 (3 ms, in float 9 ms)"),
    "faster than its own float, not than the run's": (
        costs(4, 5), [PYTORCH],
        HERE + "not faster than float either: pytorch with w4a8 (5 ms, in float 6 ms)"),
    "faster than the run's float, not than its own": (
        costs(4, 5), [replace(GGUF, costs=costs(2, 3))],
        HERE + "not faster than float either: gguf with q4_0 (3 ms, in float 2 ms)"),
}  # fmt: skip


@pytest.mark.parametrize(("measured", "others", "said"), ADVICE.values(), ids=ADVICE)
def test_what_is_said_follows_from_what_was_measured(
    measured: tuple[Cost, Cost] | None, others: list[Trial], said: str | None
) -> None:
    assert advice("onnx", measured, others) == said


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(jaxtyping.config.__dict__, "jaxtyping_disable", True)
    install(monkeypatch, onnx=5.0, pytorch=3.0)
    return monkeypatch


SLOWER = pytest.warns(UserWarning, match="in onnx the artefact is slower than the float model: 5 ms")


def test_it_is_one_warning_and_a_line_of_the_report(
    model: Classifier, tmp_path: Path, slow: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with SLOWER as warned:
        result = climbed(model, tmp_path / "run", scripted(100, 99, 98), say=said.append)
    (warning,) = [str(warning.message) for warning in warned]
    assert warning == HERE + "faster than float is pytorch with w2a8 (3 ms, in float 4 ms)"
    assert result.outcome == "passed"  # speed is no gate
    assert f"I{warning[1:]}." in run_json(tmp_path / "run")["notes"]
    assert warning[1:] in (tmp_path / "run" / "report.md").read_text()
    assert said[-3:] == [
        "slower than the float file; measuring pytorch, gguf",
        "  pytorch with w2a8 (3 ms, in float 4 ms)",
        "  gguf: no llama.cpp architecture",
    ]
    assert events(tmp_path / "run")[-2:] == ["other-target"] * 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("recipe.yaml", "plan.json", "metrics.jsonl", "run.json", "report.md", "report.html", "artefact")
    }


@pytest.mark.usefixtures("quick")
def test_nothing_else_is_measured_where_the_artefact_is_not_slower(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recoup.ladder.other_targets._tried", never)
    climbed(model, tmp_path / "run", scripted(100, 99, 98))
    assert not any("faster than float" in note for note in run_json(tmp_path / "run")["notes"])


def test_a_target_that_is_measured_is_not_measured_again(
    fitted_state: dict[str, Any], tmp_path: Path, slow: pytest.MonkeyPatch
) -> None:
    def begin(*right: int) -> Any:
        torch.manual_seed(0)
        model = Classifier()
        model.load_state_dict(fitted_state)
        return climbed(model, tmp_path / "run", scripted(*right))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with slow.context() as patch:
        patch.setitem(TARGETS, "gguf", replace(TARGETS["gguf"], check=interrupt))
        with pytest.raises(KeyboardInterrupt):
            begin(100, 99, 98)
    given = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert outcome_of_part(tmp_path / "run", given, "validate") is None
    slow.setitem(TARGETS, "pytorch", replace(TARGETS["pytorch"], write=never, costs=never))
    with SLOWER as warned:
        begin()
    assert "faster than float is pytorch with w2a8" in str(warned[0].message)
    assert outcome_of_part(tmp_path / "run", given, "validate") == "passed"


def test_a_trial_changes_no_weight_and_writes_what_the_plan_says(
    model: Classifier, tmp_path: Path, slow: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def measure(folders: tuple[Path, Path], batch: Any) -> tuple[Cost, Cost]:
        del batch
        files = [torch.load(folder / "model.pt", weights_only=False) for folder in folders]
        seen.extend(files)
        return costs(4, 3)

    slow.setitem(TARGETS, "pytorch", replace(TARGETS["pytorch"], costs=measure))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with SLOWER:
        climbed(model, tmp_path / "run", scripted(100, 99, 98))
    plain, quantized = seen
    assert type(plain.up) is nn.Linear
    assert type(quantized.up).__name__ == "CodedLinear"
    assert not quantized.training
    now = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert torch.equal(now[name], before[name]), name


def cannot(*_: Any) -> None:
    raise ValueError("pytorch: cannot be traced\nat all")


def test_a_target_that_cannot_trace_the_model_is_none(
    model: Classifier, tmp_path: Path, slow: pytest.MonkeyPatch
) -> None:
    slow.setitem(TARGETS, "pytorch", replace(TARGETS["pytorch"], write=cannot))
    said: list[str] = []
    with SLOWER as warned:
        climbed(model, tmp_path / "run", scripted(100, 99, 98), say=said.append)
    assert str(warned[0].message).endswith("no other target that is installed here runs this model")
    assert "  pytorch: pytorch: cannot be traced at all" in said


def test_a_target_that_would_take_too_long_is_not_begun(
    model: Classifier, tmp_path: Path, slow: pytest.MonkeyPatch
) -> None:
    slow.setattr(other_targets, "SECONDS", 0.1)  # 13 runs of 4 and of 5 ms are more
    slow.setitem(TARGETS, "pytorch", replace(TARGETS["pytorch"], write=never))
    said: list[str] = []
    with SLOWER:
        climbed(model, tmp_path / "run", scripted(100, 99, 98), say=said.append)
    assert "  pytorch: not measured, it would take 117 ms of 100 ms" in said


def test_a_target_that_is_not_installed_or_measures_nothing_is_not_tried(
    model: Classifier, tmp_path: Path, slow: pytest.MonkeyPatch
) -> None:
    slow.setitem(sys.modules, "gguf", None)
    with SLOWER:
        climbed(model, tmp_path / "run", scripted(100, 99, 98))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    tried = [json.loads(line)["target"] for line in lines if "other-target" in line]
    assert tried == ["pytorch"]


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))


NEAREST: dict[str, tuple[Callable[[], nn.Module], Any, str, set[str]]] = {
    "held as it is": (linear, "w4a8", "pytorch", {"w4a8"}),
    "bytes in floats": (linear, "fp8", "pytorch", {"w8a8"}),
    "4 bits of floats": (linear, "mxfp4a16", "onnx", {"w4a16"}),
    "llama.cpp's": (small, "w4a16", "gguf", {"q4_0"}),
    "llama.cpp's in onnx": (small, "q4_0", "onnx", {"w4a8"}),
    "several": (small, whole("w8a8", "w8a16"), "gguf", {"q8_0", "q8_0a16"}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "recipe", "target", "held"), NEAREST.values(), ids=NEAREST)
def test_the_nearest_preset_that_a_target_holds(
    build: Callable[[], nn.Module], recipe: Any, target: str, held: set[str]
) -> None:
    model = build()
    plan = resolve(model, Recipe.model_validate(recipe if isinstance(recipe, dict) else {"scheme": recipe}))
    other = nearest(model, plan, target)
    assert set(other.schemes) == held
    assert other.modules.keys() == plan.modules.keys()


def test_no_preset_fits_a_model_that_the_target_has_not() -> None:
    model = linear()
    with pytest.raises(ValueError, match="architecture for Sequential"):
        nearest(model, resolve(model, "w4a16"), "gguf")
