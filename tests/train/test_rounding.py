"""Stochastic rounding in training: one draw serves a step, gradients alone see it, and none of it ships."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import calibrate, convert, prepare, resolve, train
from recoup.nn import FakeQuantizer
from recoup.train.fingerprint import fingerprint
from recoup.train.lora import add_lora
from recoup.train.rounding import codes_drawn
from tests.models import recipe

from .test_train import batches, prepared, settings

SCHEMES = ["w2a16", "w4a16", "w8a8", "nvfp4a16", "q4_0", "q4_1", "mxfp4a16", "nf4", "fp8-block"]


def weight_of(model: nn.Module) -> Tensor:
    """The weight that a layer multiplies by: its product with ones on the diagonal."""
    up: Any = model.get_submodule("up")
    with torch.no_grad():
        up.bias.zero_()
    return up(torch.eye(up.in_features)).T


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("ranges", [None, "learned"], ids=str)
def test_a_seed_draws_the_same_codes_for_every_pass_and_none_are_left(impl: str, ranges: str | None) -> None:
    model = prepared("w4a16", weight_ranges=ranges)
    of_impl(model, impl)
    nearest = weight_of(model)
    with codes_drawn(model, 5):
        first, again = weight_of(model), weight_of(model)
        with torch.no_grad():
            without = weight_of(model)
    with codes_drawn(model, 6):
        other = weight_of(model)
    assert not torch.equal(first, nearest)
    assert not torch.equal(first, other)
    assert torch.equal(first, again)
    assert torch.equal(first, without)
    assert torch.equal(weight_of(model), nearest)


def of_impl(model: nn.Module, impl: str) -> None:
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.impl = impl  # pyright: ignore[reportAttributeAccessIssue]


def passes(model: nn.Module, x: Any) -> list[Tensor | None]:
    """The output and every gradient of a pass with drawn codes."""
    model.zero_grad()
    with codes_drawn(model, 5):
        y = model(x)
        y = y if isinstance(y, Tensor) else y["logits"]
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("ranges", ["static", "learned"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_implementations_draw_the_same_bits(scheme: str, ranges: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    calibrate(prepare(model, resolve(model, recipe(scheme, weight_ranges=ranges))), [torch.randn(4, 128)])
    found: list[list[Tensor | None]] = []
    for impl in ("reference", "fused"):
        of_impl(model, impl)
        found.append(passes(model, torch.ones(4, 128)))
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or (
            one is not None and other is not None and torch.equal(one, other)
        )


def test_with_an_adapter_the_sum_is_what_is_drawn() -> None:
    model = prepared("w4a16")
    add_lora(model, rank=4, targets=["up"])
    up: Any = model.up
    with torch.no_grad():
        up.lora.B.normal_(std=0.05)
    with codes_drawn(model, 5):
        expected, seen = up.weight_quantizer(up.matrix(up)), weight_of(model)
    assert torch.equal(seen, expected)
    assert not torch.equal(seen, weight_of(model))


def test_what_ships_is_the_nearest_whatever_was_left_behind() -> None:
    model = prepared("w4a16")
    clean = convert(copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.seed = 5
    assert fingerprint(convert(model).state_dict()) == fingerprint(clean.state_dict())


def seeds(model: nn.Module) -> set[int | None]:
    return {module.seed for module in model.modules() if isinstance(module, FakeQuantizer)}


def test_training_draws_in_its_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("w4a16")
    drawn: list[frozenset[int | None]] = []
    forward = type(model).forward

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            drawn.append(frozenset(seeds(self)))
        else:
            assert seeds(self) <= {None}
        return forward(self, *args, **kwargs)

    def outside(_: Mapping[str, float]) -> None:
        assert seeds(model) == {None}

    monkeypatch.setattr(type(model), "forward", noted)
    given = settings(steps=3, accumulate=2, rounding="stochastic", evaluate_every=1)
    train(model, batches(2), given, held_out=batches(1), record=outside)
    assert len(drawn) == 6
    assert drawn[0::2] == drawn[1::2], "micro-batches see the same codes"
    assert len({*drawn}) == 3, "every step draws anew"
    assert all(None not in each for each in drawn)


class StopError(Exception):
    pass


def test_an_exception_takes_the_draws_away() -> None:
    model = prepared("w4a16")

    def stop(*_: Any) -> None:
        assert None not in seeds(model)
        raise StopError

    handle = model.up.register_forward_hook(lambda *_: stop() if torch.is_grad_enabled() else None)
    with pytest.raises(StopError):
        train(model, batches(2), settings(rounding="stochastic"))
    handle.remove()
    assert seeds(model) == {None}


@pytest.mark.parametrize("stop", [3, 5])
def test_a_training_that_is_stopped_draws_on(tmp_path: Path, stop: int) -> None:
    data = batches(2)

    def run(folder: Path, seed: int, last: int | None = None) -> str:
        torch.manual_seed(7)
        model = prepared("w4a16", weight_ranges="learned")

        def record(entry: Mapping[str, float]) -> None:
            if entry["step"] == last:
                raise StopError

        torch.manual_seed(seed)
        given = settings(steps=6, rounding="stochastic", accumulate=2, checkpoint_every=2)
        train(model, data, given, record=record, checkpoints=folder)
        return fingerprint(model.state_dict())

    whole = run(tmp_path / "whole", 3)
    assert run(tmp_path / "other", 4) != whole, "torch's seed decides"
    with pytest.raises(StopError):
        run(tmp_path / "stopped", 3, stop)
    assert run(tmp_path / "stopped", 99) == whole


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"parameters": "scales"},
            "rounding: stochastic and parameters: scales asked; codes are drawn where",
        ),
        ({"dampening": 0.1}, "rounding: stochastic and dampening 0.1 asked; one has weights change codes"),
    ],
    ids=["scales", "dampening"],
)
def test_what_contradicts_it_is_refused(others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(rounding="stochastic", **others)
