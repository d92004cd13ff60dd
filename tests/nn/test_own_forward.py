"""Modules with forwards of their own: the twin runs them, and they find the rounded weight where it was."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import calibrate, convert, explain, prepare, resolve
from recoup.export import TARGETS, preflight
from recoup.nn import QuantConv2d, QuantLinear, QuantOwnForward, quantization_off
from recoup.nn.own_forward import layout_of
from recoup.numerics import dequantize, qparams_of, quantize
from recoup.schemes import PRESETS
from tests.models import recipe

WIDTH, EXPERTS = 64, 3


class Causal(nn.Conv1d):
    """As those of speech models: it pads on one side, and says by how much."""

    @cached_property
    def left(self) -> int:
        return self.kernel_size[0] - 1

    def length(self, x: Tensor) -> int:
        return x.shape[-1]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(F.pad(x, (self.left, 0)))


class Standardized(nn.Conv2d):
    """As those of BiT: it computes with a function of its weight."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Counting(nn.Linear):
    """It remembers how often it ran."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.runs += 1
        return 2 * super().forward(x)


class Stacked(nn.Module):
    """Experts with the names of transformers' and no decorator, which each see all tokens."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        up, down = torch.randn(EXPERTS, 2 * 32, WIDTH) / 8, torch.randn(EXPERTS, WIDTH, 32) / 8
        self.gate_up_proj = nn.Parameter(up.mT.contiguous() if turned else up)
        self.down_proj = nn.Parameter(down.mT.contiguous() if turned else down)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        up, down = (up.mT, down.mT) if self.turned else (up, down)
        gate, value = (x @ up.mT).chunk(2, dim=-1)
        return (gate.sigmoid() * value) @ down.mT


def of_transformers(package: str, name: str, *args: Any, **config: Any) -> nn.Module:
    import importlib

    module = importlib.import_module(f"transformers.models.{package}")
    found = getattr(module, name)
    if config:
        import transformers

        args = (getattr(transformers, config.pop("of"))(**config),)
    made = found(*args).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "causal": (lambda: Causal(32, 32, 3), lambda: (torch.randn(2, 32, 7),)),
    "standardized": (lambda: Standardized(32, 8, 3), lambda: (torch.randn(2, 32, 5, 5),)),
    "counting": (lambda: Counting(WIDTH, 32), lambda: (torch.randn(3, WIDTH),)),
    "experts": (Stacked, lambda: (torch.randn(EXPERTS, 5, WIDTH),)),
    "experts, turned": (lambda: Stacked(turned=True), lambda: (torch.randn(EXPERTS, 5, WIDTH),)),
    "a cell": (lambda: nn.GRUCell(WIDTH, 32), lambda: (torch.randn(3, WIDTH), torch.randn(3, 32))),
    "jetmoe": (
        lambda: of_transformers("jetmoe.modeling_jetmoe", "JetMoeParallelExperts", EXPERTS, WIDTH, 32),
        lambda: (torch.randn(6, WIDTH), [1, 2, 3]),
    ),
    "moshi": (
        lambda: of_transformers("moshi.modeling_moshi", "MoshiFlexibleLinear", WIDTH, 32, EXPERTS),
        lambda: (torch.randn(2, EXPERTS, WIDTH),),
    ),
    "xlnet": (
        lambda: of_transformers(
            "xlnet.modeling_xlnet", "XLNetRelativeAttention", of="XLNetConfig", d_model=64, n_head=2
        ),
        lambda: (torch.randn(5, 2, 64), None, None, None, torch.randn(10, 2, 64), None),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    """One of them alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, *args: Any) -> Tensor:
        y = self.layer(*args)
        return y[0] if isinstance(y, tuple) else y


def model_of(kind: str) -> tuple[Model, tuple[Any, ...]]:
    build, batch = KINDS[kind]
    return Model(build()).eval(), batch()


def rounded(model: Model, scheme: str) -> Model:
    """The oracle: the float model, whose weights were rounded by the definitions, axis by axis."""
    spec = PRESETS[scheme].weights
    for name, axes in layout_of(model.layer).items():
        weight = model.layer.get_parameter(name)
        inputs, end = [i for i, axis in enumerate(axes) if axis == "i"], list(range(-axes.count("i"), 0))
        last = weight.detach().movedim(inputs, end)
        matrix = last.flatten(end[0]).flatten(0, -2)
        qparams = qparams_of(matrix, spec)
        seen = dequantize(quantize(matrix, qparams, spec), qparams, spec).reshape(last.shape)
        weight.data.copy_(seen.movedim(end, inputs))
    return model


@every_kind
def test_it_is_the_float_module_with_rounded_weights(kind: str) -> None:
    model, batch = model_of(kind)
    oracle, float_model = rounded(copy.deepcopy(model), "w4a16"), copy.deepcopy(model)
    prepare(model, resolve(model, "w4a16"))
    assert type(model.layer) is QuantOwnForward
    assert torch.equal(model(*batch), oracle(*batch))
    assert not torch.equal(model(*batch), float_model(*batch))
    with quantization_off(model):
        assert torch.equal(model(*batch), float_model(*batch))


@every_kind
def test_every_matrix_trains_converts_and_keeps_its_name(kind: str) -> None:
    float_model, batch = model_of(kind)
    plan = resolve(float_model, "w8a16")
    rows = {row.parameter: row.scheme for row in explain(float_model, plan).rows}
    weights = [f"layer.{name}" for name in layout_of(float_model.layer)]
    assert {rows[name] for name in weights} == {"w8a16"}
    model = prepare(copy.deepcopy(float_model), plan)
    model(*batch).square().mean().backward()
    assert all(model.get_parameter(name).grad.count_nonzero() for name in weights)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    resumed = prepare(copy.deepcopy(float_model), plan)
    resumed.load_state_dict(model.state_dict(), strict=True)
    expected = resumed(*batch)
    assert torch.equal(model(*batch), expected)
    coded = convert(copy.deepcopy(model))
    assert torch.equal(coded(*batch), expected)
    assert {f"{name}.codes" for name in weights} <= set(coded.state_dict())
    assert not set(weights) & set(coded.state_dict())
    again = convert(prepare(float_model, plan))
    again.load_state_dict(coded.state_dict(), strict=True)
    assert torch.equal(again(*batch), expected)


def test_what_the_forward_remembers_and_what_others_ask_of_it_stay() -> None:
    model, batch = model_of("counting")
    prepare(model, resolve(model, "w8a16"))
    model(*batch)
    model(*batch)
    assert model.layer.runs == 2
    assert model.layer.weight is dict(model.named_parameters())["layer.weight"]
    model, batch = model_of("causal")
    prepare(model, resolve(model, "w8a16"))
    assert (model.layer.length(*batch), model.layer.left) == (7, 2)
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.layer.nothing


def test_a_subclass_that_computes_as_its_parent_has_the_parents_twin_and_inputs() -> None:
    class Depthwise(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, groups=channels)

    class Named(nn.Linear):
        def extra_repr(self) -> str:
            return "named"

    model = nn.Sequential(Depthwise(8), nn.Flatten(), Named(8 * 9, 4))
    expected, x = copy.deepcopy(model), torch.randn(2, 8, 5, 5)
    calibrate(prepare(model, resolve(model, "w8a8-static")), [x])
    assert [type(model[0]), type(model[2])] == [QuantConv2d, QuantLinear]
    with quantization_off(model):
        assert torch.equal(model(x), expected(x))


def test_schemes_that_quantize_inputs_leave_it_in_float_and_refuse_rules() -> None:
    model = nn.ModuleDict({"mine": Counting(32, 2), "plain": nn.Linear(256, 32)})
    plan = resolve(model, "w8a8")
    assert list(plan.modules) == ["plain"]
    assert plan.kept["mine.weight"] == "no quantized form of tests.nn.test_own_forward.Counting with inputs"
    message = (
        r"^mine: 'w8a8' quantizes inputs, and what meets the weight inside of a Counting is not known; use "
        r"w8a16 or w4a16, or keep it in float$"
    )
    with pytest.raises(ValueError, match=message):
        resolve(model, recipe("w8a16", ("mine", "w8a8")))
    assert resolve(model, recipe("w8a8", ("mine", "w8a16"))).modules == {"mine": "w8a16", "plain": "w8a8"}


def test_what_only_looks_like_experts_stays_in_float() -> None:
    class Unread(Stacked):
        """Another module reads its weights."""

        def forward(self, x: Tensor) -> Tensor:
            return x

    square = Stacked()
    square.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
    for layer in (Unread(), square):
        assert not layout_of(layer)
        with pytest.raises(ValueError, match=r"of the matrices would stay in float: 0\.gate_up_proj"):
            resolve(nn.Sequential(layer, nn.Linear(32, 32)), "w8a16")


def test_codes_of_others_are_left_alone() -> None:
    """Whose weight is no float, as bitsandbytes' of 4 bits."""
    layer = Counting(32, 32)
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"of the matrices would stay in float: 0\.weight"):
        resolve(nn.Sequential(layer, nn.Linear(32, 32)), "w8a16")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_refuses_it_before_any_work(target: str) -> None:
    model, _ = model_of("counting")
    with pytest.raises(
        ValueError, match=rf"^layer: {target} files do not hold quantized OwnForward yet; keep"
    ):
        preflight(model, resolve(model, "w8a16"), target)
