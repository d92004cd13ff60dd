"""Methods of training beside straight-through gradients: what each changes, and what it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import calibrate, param_groups, prepare, resolve, train
from recoup.train.dampening import dampen, oscillation

from .test_train import batches, prepared, settings

SCHEMES = ["w2a16", "w4a16", "w4a16-g64", "w8a8", "nvfp4a16", "q4_0", "q4_1", "mxfp4a16"]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def a_layer(scheme: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 16))
    return calibrate(prepare(model, resolve(model, scheme)), [torch.randn(4, 128)])[0]


@every_scheme
def test_dampening_pulls_to_the_code_a_weight_has_and_nothing_outside_the_range(scheme: str) -> None:
    layer = a_layer(scheme)
    layer.weight.grad = torch.zeros_like(layer.weight)
    dampen(nn.Sequential(layer), 0.5)
    with torch.no_grad():
        rounded = layer.weight_quantizer(layer.weight)
        ends = [layer.weight_quantizer(torch.full_like(layer.weight, end)) for end in (-1e4, 1e4)]
    inside = (ends[0] <= layer.weight) & (layer.weight <= ends[1])
    expected = (layer.weight - rounded).detach() * inside
    assert inside.any()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-6, atol=1e-7)


@every_scheme
def test_weights_on_their_codes_are_left_alone(scheme: str) -> None:
    layer = a_layer(scheme)
    with torch.no_grad():
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
    assert float(oscillation(layer.weight, layer.weight_quantizer).detach()) == pytest.approx(0.0, abs=1e-9)


def test_weights_with_no_gradient_get_none() -> None:
    layer = a_layer("w4a16")
    dampen(nn.Sequential(layer), 1.0)
    assert layer.weight.grad is None


def distances(model: nn.Module) -> float:
    """How far weights are from their codes."""
    up: Any = model.get_submodule("up")
    return float(oscillation(up.weight, up.weight_quantizer).detach())


def test_a_dampened_training_ends_nearer_to_its_codes() -> None:
    found: dict[float, float] = {}
    for strength in (0.0, 1.0):
        torch.manual_seed(1)
        model = prepared("w4a16")
        train(model, batches(4), settings(steps=30, dampening=strength))
        found[strength] = distances(model)
    assert found[1.0] < 0.5 * found[0.0]


@pytest.mark.parametrize("other", [{"parameters": "scales"}, {"lora": {"rank": 2}}], ids=str)
def test_dampening_where_no_weight_trains_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"dampening 0.1 asked; it pulls weights, and adapters or scales alone"
    ):
        settings(dampening=0.1, **other)


def test_freezing_where_no_range_is_learned_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"train.freeze_ranges asked, but no range is learned; set weight_ran"
    ):
        train(prepared("w4a16"), batches(1), settings(freeze_ranges=1))


def scales(model: nn.Module) -> list[Tensor]:
    return [group for groups in param_groups(model, 1.0) if groups["ranges"] for group in groups["params"]]


def test_frozen_ranges_stay_and_the_weights_go_on() -> None:
    ends: list[list[Tensor]] = []
    for steps in (2, 4):
        torch.manual_seed(1)
        model = prepared("w4a16", weight_ranges="learned")
        start = [scale.detach().clone() for scale in scales(model)]
        weight = model.up.weight.detach().clone()
        data = batches(4)
        given = settings(steps=8, freeze_ranges=2, evaluate_every=8, early_stop=None)
        if steps == 2:
            given = given.model_copy(update={"freeze_ranges": 0})
        train(model, data, given)
        ends.append([scale.detach() for scale in scales(model)])
        assert not torch.equal(model.up.weight, weight)
        moved = [not torch.equal(a, b) for a, b in zip(start, ends[-1], strict=True)]
        assert any(moved) == (steps == 4)
