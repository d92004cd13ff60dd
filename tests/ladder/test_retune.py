"""What re-tuning tries, in which order, and what it says of it."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recoup import Recipe, Result, recover
from recoup.ladder import outcome_of_part
from recoup.ladder.run_folder import RunFolder
from recoup.schemes import TrainSettings
from recoup.train import NonFiniteLossError
from tests.killing import in_a_process

from .conftest import Classifier, batches, recipe
from .test_recover import events, run_json

climb = importlib.import_module("recoup.ladder.climb")
pytestmark = pytest.mark.usefixtures("quick")
STEPS, RATE = 16, 1e-3
SEARCH = ["search"] * (8 + 4 + 2)


@dataclass
class Learner:
    """In the place of the training: what was learned so far is in the model, as the bias of a class.

    Args:
        best_rate: at which a step teaches 1; at ten times or a tenth of it, a tenth of that.
        all_there_is: after so much, nothing is left to learn.
        stops_at: the call that is interrupted, when it has trained.
        diverges_from: this rate on.
    """

    best_rate: float = RATE
    all_there_is: float = 10.0**9
    stops_at: int = 0
    diverges_from: float = 10.0**9
    calls: int = 0

    def __call__(
        self,
        model: Any,
        batches: Any,
        settings: TrainSettings,
        *,
        record: Callable[[Mapping[str, float]], None],
        **_: Any,
    ) -> None:
        self.calls += 1
        assert settings.budget is None
        decades = abs(float(torch.log10(torch.tensor(settings.learning_rate / self.best_rate))))
        before = float(model.head.bias[0].detach())
        for step in range(0, settings.steps + 1, settings.steps // 2 or 1):
            learned = min(before + step * 10**-decades, max(before, self.all_there_is))
            record({"step": step, "held_out": 1 / (1 + learned)})
            if settings.learning_rate >= self.diverges_from:
                raise NonFiniteLossError("step 1: the loss is nan; first in up")
            with torch.no_grad():
                model.head.bias[0] = learned
        if self.calls == self.stops_at:
            raise KeyboardInterrupt


def raised(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "scheme", None) is not None
            and module.scheme.name != "w2a8"]  # fmt: skip


@dataclass
class Exam:
    """Measures what was learned: all is right once it is enough, or so many layers are raised."""

    enough: float = 10.0**9
    layers: int = 10**9

    def __call__(self, model: Any) -> dict[str, Any]:
        learned, layers = float(model.head.bias[0].detach()), len(raised(model))
        passed = type(model.up) is nn.Linear or learned >= self.enough - 1e-3 or layers >= self.layers
        right = 100 if passed else 40 + min(20, int(learned / 4)) + 2 * layers
        return {"accuracy": [1] * right + [0] * (100 - right)}


def retuning(budget: str | None = "1h", **fields: Any) -> Recipe:
    train = {"steps": STEPS, "learning_rate": RATE, "evaluate_every": 8, "budget": budget}
    gate = {"metric": "accuracy", "max_decrease": "10%", "interval": "none"}
    return recipe(rungs=["rtn", "qat"], gates=[gate], **fields | {"train": train})


class Run:
    """The same run, as often as a test likes."""

    def __init__(self, folder: Path, state: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.state, self.patch = folder, state, patch
        torch.manual_seed(0)
        self.data, self.said = batches(8), list[str]()

    def __call__(self, learner: Learner, exam: Exam, given: Recipe | None = None, **more: Any) -> Result:
        self.patch.setattr(climb, "train_under_quantization", learner)
        model = Classifier()
        model.load_state_dict(self.state)
        with torch.no_grad():
            model.head.bias[0] = 0.0
        keywords: dict[str, Any] = {"calibration": self.data[:4], "train": self.data, "evaluate": exam}
        return recover(
            model, given or retuning(), folder=self.folder, say=self.said.append, **keywords, **more
        )

    @property
    def kinds(self) -> list[str]:
        return [one["kind"] for one in run_json(self.folder)["retuning"]["tries"]]


@pytest.fixture
def run(tmp_path: Path, fitted_state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path / "run", fitted_state, monkeypatch)


def test_without_a_budget_nothing_is_tried(run: Run) -> None:
    learner = Learner()
    result = run(learner, Exam(), retuning(None))
    assert (result.outcome, learner.calls) == ("failed", 1)
    assert run_json(run.folder)["retuning"] is None
    assert "Re-tuning" not in (run.folder / "report.md").read_text()


def test_where_the_recipes_training_passes_nothing_is_tried(run: Run) -> None:
    result = run(Learner(), Exam(enough=STEPS))
    assert (result.outcome, result.rung, run.kinds) == ("passed", "qat", ["recipe"])


def test_a_bad_rate_is_found_and_trained_with(run: Run) -> None:
    result = run(Learner(best_rate=0.03), Exam(enough=0.9 * STEPS))
    assert (result.outcome, result.rung) == ("passed", "qat 2")
    assert run.kinds == ["recipe", *SEARCH, "rate"]
    found = run_json(run.folder)["retuning"]
    assert [one["steps"] for one in found["tries"]] == [STEPS, *[1] * 8, *[2] * 4, *[4] * 2, STEPS]
    assert found["tries"][-1]["learning_rate"] == 0.032
    assert found["tries"][-1]["why"] == "of the rates searched, 0.032 had the lowest held-out loss"
    assert (found["raised"], found["advice"]) == ({}, [])
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in found["tries"][1:]))
    assert events(run.folder).count("try") == 15
    text = (run.folder / "report.md").read_text()
    assert "| qat 2 | of the rates searched, 0.032 had the lowest held-out loss | 0.032 | 16 |" in text
    assert result.record.curve[-1]["held_out"] == found["tries"][-1]["held_out"]


def test_the_search_begins_every_time_where_the_recipes_training_began(run: Run) -> None:
    run(Learner(), Exam())
    first, *searched = (one for one in run_json(run.folder)["retuning"]["tries"] if one["kind"] != "bits")
    own = [one["held_out"] for one in searched if one["learning_rate"] == RATE and one["kind"] == "search"]
    assert own == pytest.approx([1 / 2, 1 / 3, 1 / 5])
    assert first["held_out"] == pytest.approx(1 / 17)


def test_more_steps_are_made_while_the_curve_falls(run: Run) -> None:
    result = run(Learner(), Exam(enough=3 * STEPS))
    assert (result.outcome, result.rung) == ("passed", "qat 3")
    assert run.kinds == ["recipe", *SEARCH, "steps", "steps"]
    tries = run_json(run.folder)["retuning"]["tries"]
    assert [one["begun_from"] for one in tries[-2:]] == ["qat", "qat 2"]
    assert tries[-1]["why"] == "the held-out loss of qat 2 still fell at its last step"


@pytest.mark.parametrize("layers", [1, 2])
def test_where_nothing_more_is_learned_layers_get_more_bits(run: Run, layers: int) -> None:
    result = run(Learner(all_there_is=STEPS / 2), Exam(layers=layers))
    assert (result.outcome, result.rung) == ("passed", f"qat {1 + layers}")
    assert run.kinds == ["recipe", *SEARCH, *["bits"] * layers]
    found, plan = run_json(run.folder), json.loads((run.folder / "plan.json").read_text())
    assert len(found["retuning"]["raised"]) == layers
    for name, (before, after) in found["retuning"]["raised"].items():
        assert (before, after, plan["modules"][name]) == ("w2a8", "w4a8", "w4a8")
        assert plan["raised"][name] == {"from": "w2a8", "to": "w4a8"}
        assert f"| {name} | w2a8 | w4a8 |" in (run.folder / "report.md").read_text()
        assert result.model.get_submodule(name).scheme.name == "w4a8"
    assert found["scheme"] == f"w2a8, {layers} modules raised"
    assert "% of the modules' squared error" in found["retuning"]["tries"][-1]["why"]
    shipped = torch.load(result.artefact / "model.pt", weights_only=False)
    assert sorted(raised(shipped)) == sorted(found["retuning"]["raised"])


def test_a_run_that_still_fails_says_what_would_be_worth_more_time(run: Run) -> None:
    result = run(Learner(best_rate=1.0, all_there_is=STEPS / 8), Exam())
    assert result.outcome == "failed"
    found = run_json(run.folder)["retuning"]
    assert found["advice"] == [
        "the learning rate: the best, 0.1, was the highest of those tried; set train.learning_rate to it, "
        "and the search goes beyond"
    ]
    assert found["advice"][0] in (run.folder / "report.md").read_text()
    assert run.said[-1] == f"worth more time: {found['advice'][0]}"


def test_where_all_was_tried_it_says_so(run: Run) -> None:
    run(Learner(all_there_is=STEPS / 2), Exam(), retuning(scheme="w8a8"))
    assert run_json(run.folder)["retuning"]["advice"] == [
        "none of the three: the best rate was tried, the held-out loss had stopped falling, and onnx holds "
        "no module with more bits"
    ]


def test_a_budget_that_is_too_small_begins_nothing(run: Run) -> None:
    learner = Learner()
    run(learner, Exam(), retuning("0.000001s"))
    assert (learner.calls, run.kinds) == (1, ["recipe"])
    rate, steps, bits = run_json(run.folder)["retuning"]["advice"]
    assert rate.startswith("the learning rate: a search, and a training with what it finds, take about ")
    assert steps == "more steps: the held-out loss of qat still fell at its last step"
    assert bits.startswith("more bits: ")


def test_a_recipe_whose_training_diverges_is_re_tuned(run: Run) -> None:
    result = run(Learner(best_rate=RATE / 10, diverges_from=RATE), Exam(enough=0.9 * STEPS))
    assert (result.outcome, result.rung) == ("passed", "qat 2")
    assert run_json(run.folder)["retuning"]["tries"][-1]["learning_rate"] == RATE / 10
    errors = {one["error"] for one in run_json(run.folder)["retuning"]["tries"]}
    assert errors == {"", "step 1: the loss is nan; first in up"}


def test_a_recipe_whose_training_diverges_ends_without_a_budget(run: Run) -> None:
    with pytest.raises(NonFiniteLossError, match="first in up"):
        run(Learner(diverges_from=RATE), Exam(), retuning(None))


def test_a_worse_training_is_not_kept(run: Run) -> None:
    """Raised layers cost accuracy here, so what is shipped is the recipe's own training."""

    class Worse(Exam):
        def __call__(self, model: Any) -> dict[str, Any]:
            found = super().__call__(model)["accuracy"]
            return {"accuracy": [0] * 10 * len(raised(model)) + found[10 * len(raised(model)) :]}

    result = run(Learner(all_there_is=STEPS / 2), Worse())
    assert (result.rung, raised(result.model)) == ("qat", [])
    assert "raised" not in json.loads((run.folder / "plan.json").read_text())
    assert run.kinds[-1] == "bits"


def timeless(found: Any) -> Any:
    """Without times, which differ."""
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key not in ("seconds", "took")}
    return [timeless(value) for value in found] if isinstance(found, list) else found


def told(folder: Path) -> Any:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return timeless([run_json(folder), [json.loads(line) for line in lines]])


def test_a_run_that_is_stopped_in_any_training_goes_on_and_ends_the_same(
    tmp_path: Path, fitted_state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exam, whole = Exam(layers=2), Run(tmp_path / "whole", fitted_state, monkeypatch)
    learner = Learner(best_rate=0.03, all_there_is=STEPS / 2)
    result = whole(learner, exam)
    assert whole.kinds == ["recipe", *SEARCH, "rate", "steps", "bits", "bits"]
    for call in (1, 2, 11, *range(15, learner.calls + 1)):
        again = Run(tmp_path / str(call), fitted_state, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            again(Learner(best_rate=0.03, all_there_is=STEPS / 2, stops_at=call), exam)
        assert outcome_of_part(again.folder, retuning(), "qat") is None
        ended = again(Learner(best_rate=0.03, all_there_is=STEPS / 2), exam)
        assert told(again.folder) == told(whole.folder)
        same = ended.model.state_dict()
        assert all(torch.equal(same[name], value) for name, value in result.model.state_dict().items())


def test_real_trainings_that_are_killed_go_on_and_end_the_same(tmp_path: Path) -> None:
    """SIGKILL at a few of the places where they touch the disk or measure; see `killed_retuning.py`."""
    found = in_a_process("tests.ladder.killed_retuning", tmp_path, "211")
    assert found["lost"] == []
    assert found["points"] > 2 * 211
    kinds = [one["kind"] for one in found["run"]["retuning"]["tries"]]
    assert kinds[:12] == ["recipe", *["search"] * 10, "rate"]  # 1 step each in two of the rounds
    assert "bits" in kinds[12:]


def test_the_parts_of_a_run_re_tune_with_qat(run: Run) -> None:
    run(Learner(), Exam(enough=2 * STEPS), part="ptq")
    assert outcome_of_part(run.folder, retuning(), "qat") is None
    result = run(Learner(), Exam(enough=2 * STEPS), part="qat")
    assert (result.outcome, result.rung) == ("passed", "qat 2")
    assert outcome_of_part(run.folder, retuning(), "qat") == "passed"
    assert run(Learner(), Exam(enough=2 * STEPS)).outcome == "passed"
    assert run.kinds == ["recipe", *SEARCH, "steps"]


def test_time_that_was_lost_is_spent(tmp_path: Path) -> None:
    """A run that was stopped in a step goes on with the time of that step, however often."""

    def opened() -> RunFolder:
        return RunFolder(tmp_path, retuning(), {})

    run = opened()
    run.save()
    run.start -= 100  # as if it had taken that long
    run.record("train", step=1)
    assert 100 <= opened().seconds_of_step < 200
    assert 100 <= opened().seconds_of_step < 200  # the line is gone, and the time is not
    again = opened()
    again.save()
    assert again.seconds_of_step < 100 <= again.seconds
