"""Which modules get more bits, what they get, and that nothing else changes."""

from typing import Any

import pytest
import torch
from torch import nn

from recoup import Recipe, calibrate, prepare, resolve
from recoup.ladder.raising import give, raised_further, raised_plan

WIDE = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDE, WIDE) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


def layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(count)))


def recipe(scheme: str, target: str = "pytorch", **more: Any) -> Recipe:
    return Recipe.model_validate({"scheme": scheme, "export": {"target": target}, **more})


def errors(**largest: float) -> dict[str, float]:
    """Of twenty modules named by number, all small but for these, as _3=0.5."""
    return {str(number): largest.get(f"_{number}", 0.001) for number in range(20)}


def test_the_few_with_most_of_the_error_are_raised() -> None:
    model, given = layers(20), recipe("w2a16")
    assert raised_further(model, given, {}, errors(_3=0.5, _7=0.4)) == {"3": "w4a16"}  # it has 61 %
    assert raised_further(model, given, {}, errors(_3=0.5, _7=0.45, _9=0.45)) == {"3": "w4a16", "7": "w4a16"}
    many = errors(**{f"_{number}": 0.5 for number in range(20)})
    assert list(raised_further(model, given, {}, many)) == ["0", "1"]  # a tenth


def test_what_was_raised_stays_and_can_be_raised_again() -> None:
    model, given = layers(20), recipe("w2a16")
    assert raised_further(model, given, {"3": "w4a16"}, errors(_7=0.5)) == {"3": "w4a16", "7": "w4a16"}
    assert raised_further(model, given, {"3": "w4a16"}, errors(_3=0.5)) == {"3": "w8a16"}
    assert raised_further(model, given, {"3": "w8a16"}, errors(_3=0.5)) == {"3": "w8a16"}


def test_a_preset_that_the_target_cannot_hold_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: nn.Module, plan: Any, *_: Any, **__: Any) -> dict[str, str]:
        if "w4a16" in plan.schemes:
            raise ValueError("no kernel")
        return {}

    monkeypatch.setattr("recoup.ladder.raising.preflight", refuses)
    assert raised_further(layers(20), recipe("w2a16"), {}, errors(_3=0.5)) == {"3": "w8a16"}


def test_layers_that_an_engine_joins_are_raised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from recoup.export.fused import check_fused

    def joins(model: nn.Module, plan: Any, *_: Any, **__: Any) -> dict[str, str]:
        check_fused(model, {name: (plan[name], nn.Linear) for name in plan.modules})
        return {}

    monkeypatch.setattr("recoup.ladder.raising.preflight", joins)
    model, given = nn.Sequential(Attention()), recipe("w4a16")
    found = raised_further(model, given, {}, {"0.k_proj": 0.5, "0.q_proj": 0.1, "0.o_proj": 0.1})
    assert found == dict.fromkeys(["0.q_proj", "0.k_proj", "0.v_proj"], "w8a16")
    assert raised_further(model, given, {}, {"0.o_proj": 0.5}) == {"0.o_proj": "w8a16"}


def test_rules_of_the_recipe_give_way_and_names_are_no_patterns() -> None:
    model = nn.ModuleDict({"a[b]": nn.Linear(WIDE, WIDE), "ab": nn.Linear(WIDE, WIDE)})
    given = recipe("w2a16", rules=[{"match": "a*", "scheme": "w3a16"}])
    assert raised_plan(model, given, {"a[b]": "w4a16"}).modules == {"a[b]": "w4a16", "ab": "w3a16"}


@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_modules_get_the_twins_of_another_plan_and_the_rest_stays(ranges: str) -> None:
    float_model = layers(3)
    plain = nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(3)))
    for mine, its in zip(plain, float_model, strict=True):
        mine.weight, mine.bias = its.weight, its.bias
    given, data = recipe("w2a8", weight_ranges=ranges), [torch.randn(8, WIDE)]
    before, after = resolve(plain, given), raised_plan(plain, given, {"1": "w8a8"})
    model = calibrate(prepare(float_model, before, impl="fused"), data, observer="mse")
    weights = [layer.weight for layer in model]
    kept, old = [model[0], model[2]], model(data[0]).detach()
    assert give(model, plain, before, after) == ["1"]
    assert [model[0], model[2]] == kept
    assert [layer.scheme.name for layer in model] == ["w2a8", "w8a8", "w2a8"]
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
    assert {layer.weight_quantizer.impl for layer in model} == {"fused"}
    assert give(model, plain, after, before) == ["1"]
    assert torch.equal(calibrate(model, data, observer="mse")(data[0]), old)
    assert give(model, plain, before, before) == []
