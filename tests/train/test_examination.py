"""Training looks for symptoms by itself: it logs them, keeps them, and does not see what is not there."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import calibrate, prepare, resolve, train
from recoup.train.examination import Examination
from recoup.validate.symptoms import Symptom
from tests.models import Row, built, every_model, recipe

from .test_train import WIDTH, Small, batches, prepared, settings


def shown(model: nn.Module) -> list[str]:
    return [str(symptom) for symptom in model.recoup_symptoms]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "recoup"]


HEALTHY = {"w8a8-static": {}, "w2a16-seq": {"weight_ranges": "learned"}}


@pytest.mark.parametrize("scheme", HEALTHY)
@every_model
def test_a_healthy_training_shows_none(row: Row, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    model = built(row)
    prepare(model, resolve(model, recipe(scheme, **HEALTHY[scheme])))
    data = [row.batch(4) for _ in range(3)]
    calibrate(model, data, observer="mse")
    train(model, data[1:], settings(steps=2, learning_rate=1e-4), held_out=data[:1])
    assert shown(model) == lines(caplog) == []


def test_updates_that_are_too_small_are_told_as_soon_as_they_show(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared("w4a16")
    train(model, batches(2), settings(steps=4, learning_rate=1e-9, evaluate_every=2))
    (symptom,) = model.recoup_symptoms
    assert (symptom.module, symptom.what, symptom.first, symptom.last) == (
        "all weights",
        "nothing changes",
        1,
        4,
    )
    assert lines(caplog)[0].startswith(
        "step 1: all weights: nothing changes: none of 2,048 sampled codes changed since the start; "
    )
    assert len(lines(caplog)) == 1
    assert "raise train.learning_rate or train.steps, together " in lines(caplog)[0]


def test_while_the_rate_rises_nothing_has_to_change() -> None:
    model = prepared("w4a16")
    train(model, batches(2), settings(steps=4, warmup=3, learning_rate=1e-9, evaluate_every=1))
    (symptom,) = model.recoup_symptoms
    assert (symptom.first, symptom.last) == (4, 4)


def test_scales_that_learn_too_fast_collapse(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared("w4a16", weight_ranges="learned")
    train(model, batches(2), settings(steps=8, scale_learning_rate=0.03))
    found = [symptom for symptom in model.recoup_symptoms if symptom.what == "scale collapsed"]
    assert [symptom.module for symptom in found] == ["up.weight", "down.weight"]
    assert "lower train.scale_learning_rate" in lines(caplog)[0]


def test_a_constant_weight_is_dead_from_the_first_step_on() -> None:
    model = Small()
    nn.init.constant_(model.down.weight, 0.25)
    calibrate(prepare(model, resolve(model, "w4a16")), batches(1))
    train(model, batches(2), settings(learning_rate=1e-4))
    (symptom,) = model.recoup_symptoms
    assert (symptom.module, symptom.what, symptom.first, symptom.last) == ("down.weight", "dead", 1, 4)


class Stubborn(nn.BatchNorm1d):
    """Its owner wants it to train always."""

    def train(self, mode: bool = True) -> "Stubborn":
        self.training = True
        return self


def test_a_batchnorm_left_in_training_mode_at_evaluation_is_caught(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Stubborn(WIDTH), nn.Linear(WIDTH, WIDTH))
    calibrate(prepare(model, resolve(model, "w4a16")), [torch.randn(8, WIDTH)])
    data = [torch.randn(8, WIDTH) for _ in range(3)]
    train(model, data[1:], settings(), held_out=data[:1])
    expected = (
        "1: training mode: at an evaluation a Stubborn is in training mode, so its statistics come from the "
        "test batches and are moved by them; call model.eval(), and see that it reaches this module"
    )
    assert shown(model) == [expected]
    assert lines(caplog) == [f"step 0: {expected}"]


def test_a_quantizer_left_off_is_caught() -> None:
    model = prepared("w4a16")
    model.up.weight_quantizer.enabled = False
    train(model, batches(2), settings())
    assert [(symptom.module, symptom.what) for symptom in model.recoup_symptoms] == [
        ("up.weight", "quantizer off")
    ]


def test_a_held_out_loss_that_is_not_finite_is_traced_to_its_module() -> None:
    model, data = prepared("w4a16"), batches(3)
    data[0]["x"][0, 0] = torch.inf
    train(model, data[1:], settings(), held_out=data[:1])
    (symptom,) = model.recoup_symptoms
    assert str(symptom) == (
        "up.input_quantizer (its output): not finite: the held-out loss is not finite, so this step is not "
        "chosen; lower train.learning_rate; if it is so from the start, look at the held-out batches"
    )


def test_of_many_a_few_are_logged_and_all_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    examination = Examination(prepared("w4a16"), None, steps=9)
    many = [Symptom(module=f"{n}", what="dead", figure="so", remedy="do") for n in range(5)]
    examination.tell(1, many)
    examination.tell(3, many[1:])
    assert lines(caplog) == [
        *(f"step 1: {n}: dead: so; do" for n in range(3)),
        "step 1: 2 more symptoms, as in the report",
    ]
    assert caplog.records[0].levelno == logging.WARNING
    assert [(symptom.first, symptom.last) for symptom in examination.symptoms] == [(1, 1)] + [(1, 3)] * 4


class StopError(Exception):
    pass


def test_a_training_that_goes_on_reports_the_same(tmp_path: Path) -> None:
    """Its start is that of the whole, and what was seen before the interruption is kept."""

    def told(folder: Path, stop: int | None) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model, data = prepared("w4a8", weight_ranges="learned"), batches(3)

        def record(entry: Mapping[str, float]) -> None:
            if entry["step"] == stop:
                raise StopError

        given = settings(steps=8, scale_learning_rate=0.03, checkpoint_every=1)
        train(model, data, given, record=record, checkpoints=folder)
        return [asdict(symptom) for symptom in model.recoup_symptoms]

    whole = told(tmp_path / "whole", None)
    assert {fact["first"] for fact in whole} & {1, 2}
    assert {fact["last"] for fact in whole} == {8}
    with pytest.raises(StopError):
        told(tmp_path / "stopped", 5)
    assert told(tmp_path / "stopped", None) == whole


def test_an_examination_reads_few_values_of_each_weight() -> None:
    model: Any = nn.Sequential(nn.Linear(2048, 2048))
    prepare(model, resolve(model, "w8a8"))
    kept: Tensor = Examination(model, None, steps=1).start["0.weight"].position
    assert kept.numel() == 2**14
    assert kept.untyped_storage().nbytes() == 4 * 2**14
