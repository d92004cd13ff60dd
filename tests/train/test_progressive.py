"""Progressive bits: which step has which, what is chosen anew, and that only the plan's own ship."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recoup import calibrate, prepare, resolve, train
from recoup.calibrate.observers import OBSERVERS
from recoup.ladder.tries import shortened
from recoup.nn import FakeQuantizer, QuantLinear
from recoup.numerics import IntFormat, QuantSpec, per_group
from recoup.schemes import Scheme
from recoup.schemes.training import TrainSettings
from recoup.train.fingerprint import fingerprint
from recoup.train.progressive import Bits
from tests.models import name_of, recipe

from .test_train import batches, prepared, settings


def bits_of(model: nn.Module) -> list[int]:
    """Of the weights, in order."""
    return [
        module.weight_quantizer.spec.format.bits
        for module in model.modules()
        if isinstance(module, QuantLinear)
    ]


AFFINE = Scheme(
    name="affine",
    weights=QuantSpec(
        format=IntFormat(4, signed=False),
        granularity=per_group(32),
        scale_rule="affine",
        ranges="static",
    ),
)


def mixed() -> Any:
    """Weights of 2, 4 and 8 bits, and one of floats."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    rules = [("1", "w4a16"), ("2", "w8a16"), ("3", "nvfp4a16")]
    return prepare(model, resolve(model, recipe("w2a16", *rules)))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"steps": 6, "progressive": [8, 4]}, [8, 8, 4, 4, 2, 2]),
        ({"steps": 7, "progressive": [8, 4]}, [8, 8, 4, 4, 2, 2, 2]),
        ({"steps": 6, "progressive": [8]}, [8, 8, 8, 2, 2, 2]),
        ({"steps": 6, "progressive": [8], "start_step": 2}, [8, 8, 8, 8, 2, 2]),
        ({"steps": 3}, [2, 2, 2]),
    ],
    ids=["equal", "the last is longest", "two", "quantization off first", "none"],
)
def test_steps_are_shared_equally(asked: dict[str, Any], expected: list[int]) -> None:
    model, given = prepared("w2a16"), settings(**asked)
    bits, optimizer = Bits(model, given), torch.optim.AdamW(model.parameters())
    found: list[int] = []
    for step in range(1, given.steps + 1):
        bits.enter(step, optimizer)
        found.append(bits_of(model)[0])
        assert bits.are_own == (found[-1] == 2)
    assert found == expected


@pytest.mark.parametrize(("steps", "expected"), [(2, [4, 2]), (1, [2])], ids=str)
def test_a_search_of_few_steps_leaves_out_the_first_phases(steps: int, expected: list[int]) -> None:
    model, given = prepared("w2a16"), settings(steps=6, progressive=[8, 4])
    bits, optimizer = Bits(model, shortened(given, steps)), torch.optim.AdamW(model.parameters())
    found: list[int] = []
    for step in range(1, steps + 1):
        bits.enter(step, optimizer)
        found.append(bits_of(model)[0])
    assert found == expected


def test_every_weight_skips_what_is_not_above_its_own() -> None:
    model, given = mixed(), settings(steps=4, progressive=[8, 4, 3])
    bits, optimizer = Bits(model, given), torch.optim.AdamW(model.parameters())
    found: list[list[int]] = []
    for step in range(1, 5):
        bits.enter(step, optimizer)
        found.append(bits_of(model))
    floats = model[3].weight_quantizer.spec.format.bits
    assert found == [[two, four, 8, floats] for two, four in ((8, 8), (4, 4), (3, 4), (2, 4))]


@pytest.mark.parametrize("ranges", ["static", "learned"])
@pytest.mark.parametrize("scheme", ["w2a16", AFFINE, "q4_0", "q4_1"], ids=name_of)
def test_ranges_are_those_of_the_weight_by_then(scheme: str | Scheme, ranges: str) -> None:
    model = nn.Sequential(nn.Linear(128, 32))
    prepare(model, resolve(model, recipe(scheme, weight_ranges=ranges)))
    calibrate(model, [torch.randn(4, 128)])
    layer: Any = model[0]
    quantizer: FakeQuantizer = layer.weight_quantizer
    own, parameters = quantizer.spec, [*quantizer.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 128)).sum().backward()
    optimizer.step()
    bits = Bits(model, settings(steps=4, progressive=[8]))
    bits.enter(1, optimizer)
    assert quantizer.spec.format.bits == 8
    with torch.no_grad():
        layer.weight.mul_(1.7).add_(0.1 * torch.randn(32, 128))
    bits.enter(3, optimizer)
    assert quantizer.spec == own
    observer = OBSERVERS["mse"](own)
    observer.observe(layer.weight.detach())
    fresh = FakeQuantizer(own, rows=32, columns=128)
    fresh.set_range(*observer.range())
    assert fingerprint(quantizer.state_dict()) == fingerprint(fresh.state_dict())
    assert all(one is other for one, other in zip(parameters, quantizer.parameters(), strict=True))
    known = {id(parameter) for parameter in optimizer.state}
    assert id(layer.weight) in known
    assert not any(id(parameter) in known for parameter in parameters)


def test_the_start_and_the_last_phase_alone_are_looked_at() -> None:
    model, seen = prepared("w2a16"), list[Mapping[str, float]]()
    plan = [module.spec for module in model.modules() if isinstance(module, FakeQuantizer)]

    def record(entry: Mapping[str, float]) -> None:
        seen.append(entry)
        steps = {0: 2, 1: 8, 2: 8, 3: 4, 4: 4}
        assert bits_of(model)[0] == steps.get(int(entry["step"]), 2)

    given = settings(steps=6, progressive=[8, 4], evaluate_every=1, early_stop=9)
    train(model, batches(3), given, held_out=batches(1), record=record)
    assert [entry["step"] for entry in seen if "held_out" in entry] == [0, 5, 6]
    assert [module.spec for module in model.modules() if isinstance(module, FakeQuantizer)] == plan


class StopError(Exception):
    pass


@pytest.mark.parametrize("last", [2, 6], ids=["with more bits", "with their own"])
def test_a_training_that_fails_leaves_the_plans_bits(last: int) -> None:
    model = prepared("w2a16")
    quantizer: Any = model.up.weight_quantizer
    before, start = quantizer.spec, quantizer.scale.clone()

    def record(entry: Mapping[str, float]) -> None:
        if entry["step"] == last:
            raise StopError

    with pytest.raises(StopError):
        train(model, batches(3), settings(steps=8, progressive=[8]), record=record)
    assert quantizer.spec == before
    assert torch.equal(quantizer.scale, start) == (last == 2)


@pytest.mark.parametrize(("stop", "rounding"), [(3, "nearest"), (4, "stochastic"), (5, "stochastic")])
def test_a_training_that_is_stopped_goes_on_with_its_bits(tmp_path: Path, stop: int, rounding: str) -> None:
    data = batches(3)

    def run(folder: Path, seed: int, last: int | None = None) -> str:
        torch.manual_seed(7)
        model = prepared("w2a16", weight_ranges="learned")

        def record(entry: Mapping[str, float]) -> None:
            if entry["step"] == last:
                raise StopError

        torch.manual_seed(seed)
        given = settings(steps=8, progressive=[8, 4], checkpoint_every=1, rounding=rounding)
        train(model, data[1:], given, held_out=data[:1], record=record, checkpoints=folder)
        return fingerprint(model.state_dict())

    whole = run(tmp_path / "whole", 3)
    with pytest.raises(StopError):
        run(tmp_path / "stopped", 3, stop)
    assert run(tmp_path / "stopped", 99) == whole


def test_adapters_train_so_too() -> None:
    model = prepared("w2a16")
    start = model.up.weight.detach().clone()
    train(model, batches(2), settings(steps=4, progressive=[8], lora={"rank": 2}))
    assert not torch.equal(model.up.weight, start)
    assert bits_of(model)[0] == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"progressive": [4, 8]}, r"progressive \[4, 8\] asked, and bits fall .*: write \[8, 4\]"),
        ({"progressive": [8, 8]}, r"progressive \[8, 8\] asked, and bits fall .*: write \[8\]"),
        (
            {"progressive": [8, 4], "steps": 4, "start_step": 2},
            r"progressive \[8, 4\] asked, and 2 steps under quantization are too few for 3 phases",
        ),
        (
            {"progressive": [8], "parameters": "scales"},
            r"progressive \[8\] and parameters: scales asked; scales are chosen anew at every change",
        ),
    ],
    ids=["rising", "equal", "too few steps", "scales"],
)
def test_what_makes_no_phases_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**asked)


@pytest.mark.parametrize("bits", [2, 9])
def test_bits_that_nothing_could_have_first_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="progressive"):
        TrainSettings.model_validate({"progressive": [bits]})


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4a16"])
def test_a_plan_without_such_weights_is_refused(scheme: str) -> None:
    message = (
        r"train.progressive \[8, 4\] asked, but no weight has integers of fewer than 8 bits; leave it out"
    )
    with pytest.raises(ValueError, match=message):
        train(prepared(scheme), batches(1), settings(progressive=[8, 4]))
