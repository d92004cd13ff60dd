"""A run whose qat trains adapters, or scales alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recoup import Result, recover, train

from .conftest import Classifier, batches, recipe, scripted

LORA = {"lora": {"rank": 2, "targets": ["up"]}, "evaluate_every": 2, "checkpoint_every": 2}
TRAIN = {"steps": 4, "learning_rate": 1e-2, "loss": "logits-kl"}


class Run:
    """The same run, as often as a test likes."""

    def __init__(self, state: dict[str, Tensor], folder: Path, **fields: Any) -> None:
        torch.manual_seed(0)
        self.state, self.folder = state, folder
        self.recipe = recipe(**{"rungs": ["rtn", "qat"], "train": TRAIN | LORA} | fields)
        self.data = batches(8)

    def __call__(self, *right: int, **more: Any) -> Result:
        model = Classifier()
        model.load_state_dict(self.state)
        self.evaluate = scripted(*right)
        return recover(
            model,
            self.recipe,
            calibration=self.data[:4],
            train=self.data,
            evaluate=self.evaluate,
            folder=self.folder,
            **more,
        )


@pytest.mark.usefixtures("quick")
def test_a_run_with_lora_ships_merged_weights_and_goes_on_in_parts(
    fitted_state: dict[str, Tensor], tmp_path: Path
) -> None:
    whole = Run(fitted_state, tmp_path / "whole")(100, 50, 99, 99)
    parts = Run(fitted_state, tmp_path / "parts")
    parts(100, 50, part="ptq")
    found = parts(99, part="qat")
    assert (whole.outcome, whole.rung) == (found.outcome, found.rung) == ("passed", "qat")
    one, other = whole.model.state_dict(), found.model.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = [name for name, value in fitted_state.items() if not torch.equal(value, one[name])]
    assert moved == ["up.weight"]
    assert parts(part="export").artefact == tmp_path / "parts" / "artefact"


@pytest.mark.usefixtures("quick")
def test_a_run_that_was_stopped_in_training_adapters_ends_the_same(
    fitted_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(fitted_state, tmp_path / "whole")(100, 50, 99, 99)
    stopped = Run(fitted_state, tmp_path / "stopped")

    def interrupted(*arguments: Any, record: Any, **keywords: Any) -> Any:
        def stop(entry: dict[str, float]) -> None:
            record(entry)
            if entry["step"] == 3:
                raise KeyboardInterrupt

        return train(*arguments, record=stop, **keywords)

    monkeypatch.setattr("recoup.ladder.climb.train_under_quantization", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped(100, 50)
    monkeypatch.setattr("recoup.ladder.climb.train_under_quantization", train)
    one, other = whole.model.state_dict(), stopped(99, 99).model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


REFUSED = {
    "target": (
        {"train": TRAIN | {"lora": {"targets": ["dwon"]}}},
        "lora.targets: 'dwon' matches no module; did you mean down",
    ),
    "scales": (
        {"train": TRAIN | {"parameters": "scales"}},
        "train.parameters: scales asked, but no range is learned; set weight_ranges: learned",
    ),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused_before_the_first_measurement(
    case: str, fitted_state: dict[str, Tensor], tmp_path: Path
) -> None:
    fields, message = REFUSED[case]
    run = Run(fitted_state, tmp_path / "run", **fields)
    with pytest.raises(ValueError, match=message):
        run()
    assert run.evaluate.models == []
    assert not run.folder.exists()


@pytest.mark.usefixtures("quick")
def test_a_run_of_scales_alone_moves_no_weight(fitted_state: dict[str, Tensor], tmp_path: Path) -> None:
    given = TRAIN | {"parameters": "scales"}
    run = Run(fitted_state, tmp_path / "run", weight_ranges="learned", train=given)
    found = run(100, 50, 99, 99).model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in fitted_state.items())
