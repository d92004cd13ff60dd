"""A run that was stopped goes on, and ends as if nothing had happened."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recoup import Result, recover
from recoup.ladder import outcome_of_part
from tests.killing import in_a_process

from .conftest import Classifier, batches, recipe, scripted
from .test_recover import events, never, run_json


def test_a_run_that_is_killed_anywhere_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL at every ninth place where it touches the disk or measures; see `killed.py`."""
    found = in_a_process("tests.ladder.killed", tmp_path, "9")
    assert found["lost"] == []
    assert found["points"] > 100
    assert [event["event"] for event in found["events"]] == [
        *("baseline", "rung", "rung"), *["train"] * 7, *("rung", "export", "artefact"),
        *["other-target"] * 2,
    ]  # fmt: skip
    assert [rung["outcome"] for rung in found["run"]["rungs"]] == ["failed", "failed", "passed"]


class Again:
    """The same run, called as often as a test likes."""

    def __init__(self, state: dict[str, Any], folder: Path, **fields: Any) -> None:
        torch.manual_seed(0)
        self.state, self.folder, self.recipe = state, folder, recipe(**fields)
        self.data = batches(8)

    def __call__(self, *right: Any, evaluate: Any = None, **more: Any) -> Result:
        model = Classifier()
        model.load_state_dict(self.state)
        self.evaluate = evaluate or scripted(*right)
        keywords = {"calibration": self.data[:4], "train": self.data, "folder": self.folder} | more
        result = recover(model, self.recipe, evaluate=self.evaluate, **keywords)
        assert not getattr(self.evaluate, "left", None), "the run measured less than it was to"
        return result


@pytest.fixture
def again(fitted_state: dict[str, torch.Tensor], tmp_path: Path, quick: None) -> Again:
    return Again(fitted_state, tmp_path / "run")


def stopping(*right: int) -> Callable[[nn.Module], Any]:
    """Measures so often, and is interrupted then."""
    evaluate = scripted(*right)

    def measure(model: nn.Module) -> Any:
        if not evaluate.left:
            raise KeyboardInterrupt
        return evaluate(model)

    return measure


@pytest.mark.parametrize("measured", [1, 2, 3, 4])
def test_nothing_is_measured_twice(again: Again, measured: int) -> None:
    right = (100, 50, 52, 99, 99)  # float, rtn, mse, qat, file
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(*right[:measured]))
    said: list[str] = []
    result = again(*right[measured:], say=said.append)
    names = ["baseline", "rtn", "mse", "qat"][:measured]
    assert said[0] == f"going on; measured already: {', '.join(names)}"
    assert (result.outcome, result.rung) == ("passed", "qat")
    assert events(again.folder) == ["baseline", "rung", "rung", *["train"] * 4, "rung", "export", "artefact"]
    assert not (again.folder / "unfinished").exists()
    assert [entry["step"] for entry in result.record.curve] == [0, 1, 2, 3]


@pytest.mark.parametrize("measured", [3, 4])
def test_what_training_showed_is_in_the_report_of_a_run_that_goes_on(again: Again, measured: int) -> None:
    """Stopped when the trained model is to be measured, and after that."""
    train = {"steps": 3, "learning_rate": 1e-9, "evaluate_every": 2}
    again.recipe = recipe(train=train)
    right = (100, 50, 52, 99, 99)
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(*right[:measured]))
    (symptom,) = again(*right[measured:]).record.symptoms
    assert (symptom.module, symptom.what, symptom.first, symptom.last) == (
        "all weights",
        "nothing changes",
        1,
        3,
    )
    assert run_json(again.folder)["symptoms"] == [asdict(symptom)]
    assert f"| all weights | nothing changes | {symptom.figure} | 1 to 3 |" in (
        again.folder / "report.md"
    ).read_text(encoding="utf-8")


def test_the_samples_of_the_baseline_are_kept_one_by_one(again: Again) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(90))
    result = again(90, 90)
    assert result.verdicts[0].lo is not None
    assert result.record.baseline == {"accuracy": 0.9}


def test_the_parts_are_the_run(again: Again) -> None:
    assert again(100, 50, 52, part="ptq").outcome == "failed"
    assert events(again.folder) == ["baseline", "rung", "rung"]
    assert outcome_of_part(again.folder, again.recipe, "ptq") == "failed"
    assert outcome_of_part(again.folder, again.recipe, "qat") is None
    result = again(99, part="qat")
    assert (result.outcome, result.rung, result.artefact) == ("passed", "qat", None)
    assert not (again.folder / "artefact").exists()
    result = again(part="export")
    assert result.artefact == again.folder / "artefact"
    assert outcome_of_part(again.folder, again.recipe, "export") == "passed"
    assert not (again.folder / "run.json").exists()
    assert again(98, part="validate").verdicts[0].candidate == 0.98
    assert run_json(again.folder)["outcome"] == "passed"
    for part in (None, "ptq", "qat", "export", "validate"):
        assert outcome_of_part(again.folder, again.recipe, part) == "passed"


def test_a_failed_rung_is_exported_where_that_is_asked_and_replaced_by_a_better_one(again: Again) -> None:
    again(100, 50, 52, part="ptq")
    assert again(part="export").rung == "mse"
    assert again(51, part="validate").outcome == "failed"
    assert "failed" in (again.folder / "report.md").read_text()
    assert not (again.folder / "run.json").exists()  # qat is left
    again(99, part="qat")
    with pytest.raises(ValueError, match="run: rung qat is not exported yet; run recoup export first"):
        again(part="validate")
    result = again(98)
    assert (result.outcome, result.rung) == ("passed", "qat")
    assert run_json(again.folder)["rung"] == "qat"


def test_the_verdict_of_a_replaced_artefact_does_not_count(again: Again) -> None:
    """The file of rtn passed, though rtn did not; then qat is better, fails, and is not exported."""
    again.recipe = recipe(rungs=["rtn", "qat"])
    again(100, 50, part="ptq")
    again(part="export")
    assert again(95, part="validate").outcome == "passed"
    result = again(60)
    assert (result.outcome, result.rung, result.artefact) == ("failed", "qat", None)
    found = run_json(again.folder)
    assert (found["outcome"], found["rung"], found["artefact"]) == ("failed", "qat", None)
    assert found["verdicts"][0]["candidate"] == 0.6


def test_a_part_that_climbs_ends_with_the_outcome_of_its_rung(again: Again) -> None:
    again.recipe = recipe(rungs=["rtn", "qat"])
    again(100, 50, part="ptq")
    assert again(part="export").outcome == "failed"
    assert again(51, part="validate").outcome == "failed"
    result = again(100, part="qat")
    assert (result.outcome, result.rung, result.artefact) == ("passed", "qat", None)
    assert result.verdicts[0].candidate == 1.0
    result = again(part="export")
    assert (result.outcome, result.artefact) == ("passed", again.folder / "artefact")
    assert again(40, part="validate").outcome == "failed"


def test_an_artefact_that_was_moved_away_is_exported_again(again: Again, tmp_path: Path) -> None:
    again.recipe = recipe(rungs=["rtn", "qat"])
    again(100, 50, part="ptq")
    again(part="export")
    again(51, part="validate")
    (again.folder / "artefact").rename(tmp_path / "mine")
    assert outcome_of_part(again.folder, again.recipe, "export") is None
    with pytest.raises(ValueError, match="rung rtn is not exported yet; run recoup export first"):
        again(evaluate=never, part="validate")
    again(part="export")
    assert (again.folder / "artefact" / "model.pt").is_file()
    assert again(52, part="validate").verdicts[0].candidate == 0.52


def test_only_our_own_drafts_are_cleared(again: Again, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(100, 50))
    theirs = [again.folder / name for name in (".git/HEAD", ".artefact-notes/a", "unfinished/.notes/a")]
    ours = [again.folder / name for name in (".artefact-ab_12cd8/artefact/a", "unfinished/.float/a")]
    ours += [again.folder / name for name in (".run.json.unfinished", ".report.md.unfinished")]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("a")
    (again.folder / ".link.unfinished").symlink_to(tmp_path / "elsewhere")
    (again.folder / ".env").write_text("a")
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(51))
    assert all(path.is_file() for path in (*theirs, again.folder / ".env", tmp_path / "elsewhere" / "a"))
    assert (again.folder / ".link.unfinished").is_symlink()
    assert not any(path.exists() for path in ours)


def test_looking_says_that_a_step_is_damaged(again: Again) -> None:
    again(100, 50, 52, part="ptq")
    steps = sorted((again.folder / "unfinished" / "steps").iterdir())
    (steps[-1] / "state.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="step-000003: .* going on from step-000002"):
        assert outcome_of_part(again.folder, again.recipe, "ptq") is None


def test_a_part_needs_what_comes_before_it(again: Again) -> None:
    for part in ("export", "validate"):
        with pytest.raises(
            ValueError, match="run: no rung is measured yet; run recoup ptq or recoup qat first"
        ):
            again(evaluate=never, part=part)
    assert not again.folder.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("rungs", "part", "message"),
    [
        (["qat"], "ptq", "rungs: the recipe calibrates nothing by itself; add rtn or mse, or run recoup qat"),
        (["rtn"], "qat", "rungs: the recipe trains nothing; add qat to them"),
    ],
)
def test_a_part_that_the_recipe_has_not(rungs: list[str], part: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Again(Classifier().state_dict(), tmp_path / "run", rungs=rungs)(evaluate=never, part=part)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_every_observer_is_a_rung_and_so_are_gptq_and_bias(
    fitted_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    rungs = ["rtn", "moving-average", "percentile", "kl", "mse", "gptq", "bias"]
    run = Again(fitted_state, tmp_path / "run", scheme="w8a8-static", rungs=rungs)
    result = run(100, 50, 51, 52, 53, 54, 55, 56)
    assert [rung.name for rung in result.record.rungs] == rungs
    assert result.rung == "bias"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("found", "kept"), [(54, True), (52, False)])
@pytest.mark.parametrize(("rung", "state"), [("gptq", "up.weight"), ("bias", "up.bias")])
def test_a_student_of_gptq_or_bias_follows_the_float_model(
    rung: str,
    state: str,
    found: int,
    kept: bool,
    fitted_state: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def train(model: torch.nn.Module, batches: Any, settings: Any, *, teacher: Any, **_: Any) -> None:
        told = teacher.state_dict()
        assert all(torch.equal(told[name], weight) for name, weight in fitted_state.items())
        seen.append(not torch.equal(model.state_dict()[state], fitted_state[state]))

    monkeypatch.setattr("recoup.ladder.climb.train_under_quantization", train)
    again = Again(fitted_state, tmp_path / "run", rungs=["mse", rung, "qat"])
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(100, 53, found))  # the float model is to be had after an interruption too
    again(55)
    assert seen == [kept, kept]  # what is worse than before it is not trained on


def test_a_damaged_step_costs_that_step(again: Again) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(100, 50, 52))
    steps = sorted((again.folder / "unfinished" / "steps").iterdir())
    (steps[-1] / "state.safetensors").write_bytes(b"cut")
    with pytest.warns(
        UserWarning, match=r"step-000003: state\.safetensors is not .*; going on from step-000002"
    ):
        result = again(52, 99, 99)
    assert [rung.name for rung in result.record.rungs] == ["rtn", "mse", "qat"]


def test_a_run_goes_on_with_its_model_and_its_data_only(again: Again) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(100))
    before = {path: path.read_bytes() for path in again.folder.rglob("*") if path.is_file()}
    for more, named in (
        ({"calibration": batches(9)[5:]}, "sha256 of the calibration batches"),
        ({"train": batches(9)[1:]}, "sha256 of the training batches"),
        ({"facts": {"sha256 test.jsonl": "ab"}}, "sha256 test.jsonl"),
    ):
        with pytest.raises(ValueError, match=rf"was begun with other {named}; go on with those, or choose"):
            again(evaluate=never, **more)
    again.state = Classifier().state_dict()
    with pytest.raises(ValueError, match="was begun with other sha256 of the float weights"):
        again(evaluate=never)
    assert {path: path.read_bytes() for path in again.folder.rglob("*") if path.is_file()} == before


def test_a_link_out_of_the_run_is_not_followed(
    fitted_state: dict[str, torch.Tensor], tmp_path: Path, quick: None
) -> None:
    run = Again(fitted_state, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(evaluate=stopping(100))
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / "artefact").symlink_to(tmp_path / "outside")
    with pytest.raises(
        ValueError, match=r"export.to: 'artefact' leads to .*outside, out of the run's folder"
    ):
        run(evaluate=never)
    assert not list((tmp_path / "outside").iterdir())


def test_a_full_disk_leaves_what_was_finished(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=stopping(100, 50))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            again(52)
    assert again(52, 99, 99).outcome == "passed"


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_measured_in_training_mode_is_refused(tmp_path: Path) -> None:
    class Dropping(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().forward(self.dropout(x))

    def evaluate(model: nn.Module) -> dict[str, Any]:
        model.train()(**batches(1)[0])
        return {"accuracy": [1.0] * 9}

    with pytest.raises(ValueError, match="dropout: a Dropout runs in training mode"):
        recover(Dropping(), recipe(rungs=["rtn"]), calibration=batches(4), evaluate=evaluate,
                folder=tmp_path / "run")  # fmt: skip
