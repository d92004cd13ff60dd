"""A layer whose weight the module around it takes stays in float: its quantizer would never be asked."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import prepare, resolve
from tests.models import recipe

WIDTH = 64


class Around(nn.Module):
    """With two layers of which one is not asked, in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 32 * WIDTH)
        self.taken = nn.Linear(WIDTH, WIDTH)

    def init_weights(self) -> None:
        nn.init.zeros_(self.wide.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(F.linear(x, self.taken.weight))


class Method(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x @ self.taken.weight.mT)


def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def calling(*args: Any) -> Any:
        return method(*args)

    return calling


class Decorated(Around):
    @wrapped
    def forward(self, x: Tensor) -> Tensor:
        return self.wide(sum(F.linear(part, self.taken.weight) for part in [x]))


class Deep(Around):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Around()

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.taken(F.linear(x, self.inner.taken.weight)))


class Asked(Around):
    """Of its weight it wants to know the dtype; a faster path takes it, where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.linear(x, self.taken.weight)
        return self.wide(self.taken(x.to(self.wide.weight.dtype)))


@pytest.mark.parametrize("build", [Around, Method, Decorated], ids=lambda build: build.__name__)
def test_what_is_taken_stays_in_float_and_says_who_takes_it(build: type[nn.Module]) -> None:
    model = nn.Sequential(build())
    reason = (
        f"no quantized form of the tests.nn.test_unasked.{build.__name__} around it, which reads its weight"
    )
    for asked in ("w8a16", recipe("w8a16", ("0.*", "w4a16"))):
        plan = resolve(model, asked)
        assert list(plan.modules) == ["0.wide"]
        assert plan.kept["0.taken.weight"] == reason
    assert type(prepare(model, plan)[0].taken) is nn.Linear


def test_a_rule_that_asks_for_what_would_stay_in_float_is_an_error() -> None:
    model = nn.Sequential(Around())
    with pytest.raises(ValueError, match=r"only 0\.taken, whose weight the .*Around around it reads"):
        resolve(model, recipe("w8a16", ("*.taken", "w4a16")))
    assert resolve(model, recipe("w8a16", ("*.taken", "none"))).kept["0.taken.weight"] == "rule '*.taken'"


def test_layers_further_inside_are_seen() -> None:
    plan = resolve(nn.Sequential(Deep()), "w8a16")
    assert set(plan.modules) == {"0.wide", "0.taken", "0.inner.wide"}


def test_a_layer_that_is_asked_is_quantized() -> None:
    model = nn.Sequential(Asked())
    assert set(resolve(model, "w8a16").modules) == {"0.wide", "0.taken"}
    assert torch.isfinite(prepare(model, resolve(model, "w8a16"))(torch.randn(2, WIDTH))).all()
