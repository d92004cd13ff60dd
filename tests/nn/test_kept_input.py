"""An input that several layers read is quantized once; and when it is another input."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import calibrate, prepare, resolve
from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.schemes import PRESETS
from tests.models import WIDTH, features, recipe


class Siblings(nn.Module):
    """Query, key and value of one input; and what stands between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.query(x)
        x = self.between(x)
        return y + 2 * self.key(x) - 3 * self.value(x)


class Written(Siblings):
    def between(self, x: Tensor) -> Tensor:
        return x.mul_(1.5)


class Another(Siblings):
    def between(self, x: Tensor) -> Tensor:
        return x + 0.25


class Part(Siblings):
    """The same storage, and other rows of it."""

    def between(self, x: Tensor) -> Tensor:
        return x[:1].expand_as(x)


class Gone(Siblings):
    """The next input has the address of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer((x + i).clone()) for i, layer in enumerate((self.query, self.key, self.value)))


def prepared(kind: type[Siblings], scheme: str, impl: str, rules: Any = ()) -> Siblings:
    torch.default_generator.manual_seed(0)
    model = kind()
    return calibrate(prepare(model, resolve(model, recipe(scheme, *rules)), impl=impl), [features()])


def passed(model: nn.Module) -> list[Tensor]:
    x = features().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the inputs whose codes were decided, in turn."""
    names: list[str] = []
    decide = FakeQuantizer.kept

    def counted(self: FakeQuantizer, *args: Any) -> Any:
        if not self.is_weight:
            names.append(self.path)
        return decide(self, *args)

    monkeypatch.setattr(FakeQuantizer, "kept", counted)
    return names


DYNAMIC = [name for name, scheme in PRESETS.items() if scheme.inputs and scheme.inputs.ranges == "dynamic"]


@pytest.mark.parametrize("kind", [Siblings, Written, Another, Part, Gone])
@pytest.mark.parametrize("scheme", DYNAMIC)
def test_values_and_gradients_are_the_equations(kind: type[Siblings], scheme: str) -> None:
    expected, found = (passed(prepared(kind, scheme, impl)) for impl in ("reference", "fused"))
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.equal(theirs, ours)


def test_siblings_decide_once(decided: list[str]) -> None:
    model = prepared(Siblings, "w4a8", "fused")
    decided.clear()
    passed(model)
    assert decided == ["query.input"]
    passed(model)
    assert decided == ["query.input"] * 2


@pytest.mark.parametrize("kind", [Written, Another, Part])
def test_what_is_not_the_same_input_is_decided_anew(kind: type[Siblings], decided: list[str]) -> None:
    model = prepared(kind, "w4a8", "fused")
    decided.clear()
    passed(model)
    assert decided == ["query.input", "key.input"]


def test_another_lattice_decides_for_itself(decided: list[str]) -> None:
    model = prepared(Siblings, "w4a8", "fused", [("key", "mxfp8")])
    decided.clear()
    passed(model)
    assert decided == ["query.input", "key.input", "value.input"]


def test_without_gradients_nothing_is_remembered(decided: list[str]) -> None:
    model = prepared(Siblings, "w4a8", "fused")
    decided.clear()
    with torch.no_grad():
        model(features())
    assert decided == ["query.input", "key.input", "value.input"]


def test_what_is_kept_for_siblings_is_one_byte_a_value() -> None:
    model, x = prepared(Siblings, "w4a8", "fused"), torch.randn(512, WIDTH, requires_grad=True)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert sum(held.values()) <= 512 * WIDTH + 4 * 512
    del y


def test_a_graph_from_before_a_weight_was_written_to_is_refused_as_in_float() -> None:
    model = prepared(Siblings, "w4a8", "fused")
    y = model(features()).sum()
    with torch.no_grad():
        model.key.weight.mul_(0.5)
    model(features())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
