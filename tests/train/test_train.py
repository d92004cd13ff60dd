"""The loop: it recovers, it never makes worse, and it says what is wrong."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import calibrate, param_groups, prepare, ptq, resolve, train
from recoup.nn import FakeQuantizer, quantization_off
from recoup.schemes.training import TrainSettings
from recoup.train import NonFiniteLossError, check_scales_are_trained, float_copy, warmup_cosine
from tests.models import recipe

WIDTH = 32


class Small(nn.Module):
    """A classifier of vectors; its loss is there when labels are."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.down(torch.relu(self.norm(self.up(x))))
        logits = self.head(self.dropout(torch.relu(hidden)))
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def batches(count: int, samples: int = 16, labels: bool = False) -> list[dict[str, Tensor]]:
    drawn = [{"x": torch.randn(samples, WIDTH)} for _ in range(count)]
    return [{**batch, "labels": batch["x"][:, :4].argmax(1)} for batch in drawn] if labels else drawn


def prepared(scheme: str = "w2a8", **fields: Any) -> Small:
    model = Small(fields.pop("dropout", 0.0))
    prepare(model, resolve(model, recipe(scheme, **fields)))
    calibrate(model, batches(2), observer="mse")
    return model


def settings(**fields: Any) -> TrainSettings:
    return TrainSettings.model_validate({"steps": 4, "learning_rate": 1e-3, "evaluate_every": 2} | fields)


def test_it_recovers_what_quantization_cost() -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in batches(150, 64, labels=True):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    calibrate(prepare(model, resolve(model, "w2a8")), batches(2), observer="mse")
    unseen, seen = batches(8, 64, labels=True), list[Mapping[str, float]]()
    with quantization_off(model):
        exact = mean_loss(model, unseen)
    quantized = mean_loss(model, unseen)
    found = train(model, batches(16, 64), settings(steps=100, evaluate_every=25),
                  held_out=batches(2, 64), record=seen.append)  # fmt: skip
    assert found is model
    assert exact < mean_loss(model, unseen) < quantized
    assert [entry["step"] for entry in seen] == list(range(101))
    assert [entry["step"] for entry in seen if "held_out" in entry] == [0, 25, 50, 75, 100]
    assert sum(entry["loss"] for entry in seen[-16:]) < sum(entry["loss"] for entry in seen[1:17])
    assert seen[-1]["held_out"] < seen[0]["held_out"]


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    return sum(float(model(**batch)["loss"]) for batch in data) / len(data)


def test_the_best_step_is_restored_and_never_worse_than_the_start() -> None:
    model, data, held_out = prepared(weight_ranges="learned"), batches(4), batches(2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Mapping[str, float]] = []
    train(model, data, settings(learning_rate=1e3), held_out=held_out, record=seen.append)
    assert seen[-1]["held_out"] > seen[0]["held_out"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    train(model, data, settings(learning_rate=1e3))  # without held-out batches the last step stays
    assert not torch.equal(model.up.weight, state["up.weight"])


def test_the_same_seed_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = prepared(dropout=0.5)
        data = batches(3, labels=True)
        train(model, data, settings(loss={"task": 0.5, "logits-kl": 0.5}), held_out=batches(1, labels=True))
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_accumulated_halves_are_the_whole() -> None:
    """AdamW's first step is lr g / (|g| + eps): it shows the sign of every gradient, and its size near eps.

    Summed in another order, a gradient is off by at most n 2^-24 times the sum of magnitudes; here n counts
    16 samples and 32 features. An element 2^-10 of the largest or more keeps its sign, and its step.
    """
    whole = batches(2, samples=16, labels=True)
    halves = [{k: v[half] for k, v in b.items()} for b in whole for half in (slice(0, 8), slice(8, 16))]
    model = prepared("w4a16")
    other, start = copy.deepcopy(model), copy.deepcopy(model)
    losses: list[float] = []
    for trained, data, accumulate in ((model, whole, 1), (other, halves, 2)):
        seen: list[Mapping[str, float]] = []
        train(trained, data, settings(steps=1, loss="task", accumulate=accumulate), record=seen.append)
        losses.append(seen[1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=64 * 2**-24)
    start(**whole[0])["loss"].backward()
    compared, rate, eps = 0, 1e-3, 1e-8
    for a, b, origin in zip(model.parameters(), other.parameters(), start.parameters(), strict=True):
        assert origin.grad is not None
        gradient = origin.grad.abs()
        clear = gradient > 2**-10 * gradient.max()
        off = 16 * WIDTH * 2**-24 * gradient.max()
        # d step / d g = lr eps / (|g| + eps)^2, and rounding of the weight itself
        bound = rate * eps / gradient[clear].square() * off + 4 * 2**-24 * origin[clear].abs() + rate * 2**-20
        assert ((a[clear] - b[clear]).abs() <= bound).all()
        assert ((a[clear] - origin[clear]).abs() > rate / 2).all()
        compared += int(clear.sum())
    assert compared > 1000


def spied(model: nn.Module) -> list[bool]:
    """Whether the first quantizer was on, forward by forward."""
    quantizer = model.up.weight_quantizer
    found: list[bool] = []
    quantizer.register_forward_pre_hook(lambda module, inputs: found.append(module.enabled))
    return found


def test_quantization_starts_at_its_step() -> None:
    model = prepared()
    teacher, found = float_copy(model), spied(model)
    train(model, batches(4), settings(steps=4, start_step=2), teacher=teacher)
    assert found == [False, False, True, True]
    assert all(module.enabled for module in model.modules() if isinstance(module, FakeQuantizer))


def test_the_learning_rate_warms_up_and_falls_on_a_cosine() -> None:
    seen: list[Mapping[str, float]] = []
    train(prepared(), batches(2), settings(steps=6, warmup=2, learning_rate=1.0), record=seen.append)
    rates = [entry["learning_rate"] for entry in seen[1:]]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert warmup_cosine(4, 0)(4) == 0.0


@pytest.mark.parametrize("norm", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        found.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(prepared(), batches(2, labels=True), settings(steps=2, loss="task", clip_norm=norm))
    assert len(found) == 2
    if norm < 1:  # clip_grad_norm_ divides by the norm plus 1e-6
        assert all(value == pytest.approx(norm, rel=1e-4) for value in found)
    else:
        assert all(1e-2 < value < norm for value in found)


def test_bf16_is_autocast_over_float32_masters() -> None:
    model, dtypes = prepared("w4a16"), set()
    model.down.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype) if output.requires_grad else None
    )
    before = model.up.weight.clone()
    train(model, batches(2), settings(steps=2, precision="bf16"))
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(model.up.weight, before)
    assert not torch.equal(model.up.weight, model.up.weight.bfloat16().float())


def test_the_groups_decay_weights_and_nothing_else() -> None:
    model = prepared("w4a8", weight_ranges="learned")
    weights, vectors, scales = param_groups(model, lr=1e-3, scale_lr=1e-4, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in weights["params"]} == {"up.weight", "down.weight", "head.weight"}
    assert {names[id(p)] for p in vectors["params"]} == {
        f"{m}.bias" for m in ("up", "down", "head", "norm")
    } | {"norm.weight"}
    assert {names[id(p)] for p in scales["params"]} == {
        "up.weight_quantizer.scale",
        "down.weight_quantizer.scale",
    }
    assert [(g["lr"], g["weight_decay"]) for g in (weights, vectors, scales)] == [
        (1e-3, 0.1),
        (1e-3, 0.0),
        (1e-4, 0.0),
    ]
    model.up.weight.requires_grad_(False)
    frozen = param_groups(model, lr=1e-3)
    assert "up.weight" not in {names[id(p)] for group in frozen for p in group["params"]}


def test_learned_scales_move_and_an_optimizer_from_before_is_refused() -> None:
    model = Small()
    early = torch.optim.AdamW(model.parameters())
    prepare(model, resolve(model, recipe("w4a8", weight_ranges="learned")))
    calibrate(model, batches(2))
    with pytest.raises(ValueError, match=r"up\.weight_quantizer\.scale and 1 more learned scales are in no"):
        check_scales_are_trained(model, early)
    check_scales_are_trained(model, torch.optim.AdamW(param_groups(model, lr=1e-3)))
    before = model.down.weight_quantizer.scale.clone()
    train(model, batches(2), settings(steps=2, scale_learning_rate=1e-2))
    assert not torch.equal(model.down.weight_quantizer.scale, before)


def test_teacher_and_modes_are_as_they_were() -> None:
    model = prepared(dropout=0.5)
    teacher = float_copy(model).train()
    teacher.norm.requires_grad_(False)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    train(model, batches(2), settings(), teacher=teacher, held_out=batches(1))
    assert [module.training for module in model.modules()] == modes
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in state.items())
    assert [parameter.requires_grad for parameter in teacher.parameters()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("loss", "expected"), [("distill", {False}), ("task", {True}), ({"task": 1.0, "logits-kl": 1.0}, {True})]
)
def test_dropout_is_on_only_for_the_task(loss: Any, expected: set[bool]) -> None:
    model, modes = prepared(dropout=0.5), set()
    model.dropout.register_forward_pre_hook(
        lambda module, inputs: modes.add(module.training) if inputs[0].requires_grad else None
    )
    train(model, batches(2, labels=True), settings(steps=2, loss=loss))
    assert modes == expected


def test_a_float_copy_is_the_float_model_and_apart() -> None:
    model, batch = prepared(), batches(1)[0]
    teacher = float_copy(model)
    with quantization_off(model):
        assert torch.equal(teacher(**batch)["logits"], model(**batch)["logits"])
    assert not torch.equal(teacher(**batch)["logits"], model(**batch)["logits"])
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}


def poisoned(name: str, value: float) -> Any:
    def poison(model: nn.Module, data: list[dict[str, Tensor]]) -> None:
        with torch.no_grad():
            model.get_parameter(name)[0] = value

    return poison


def poisoned_batch(model: nn.Module, data: list[dict[str, Tensor]]) -> None:
    data[1]["x"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("poison", "step", "culprit"),
    [
        (poisoned("head.weight", torch.inf), 1, r"head \(its weight\)"),
        (poisoned("norm.bias", torch.nan), 1, r"norm \(its bias\)"),
        (poisoned("down.weight", torch.nan), 1, r"down\.weight$"),
        (poisoned_batch, 2, r"up\.input$"),
    ],
)
def test_a_loss_that_is_not_finite_is_traced_to_its_module(poison: Any, step: int, culprit: str) -> None:
    model, data = prepared(), batches(2, labels=True)
    poison(model, data)
    with pytest.raises(NonFiniteLossError, match=rf"step {step}: the loss is (nan|inf); first in {culprit}"):
        train(model, data, settings(loss="task"))
    assert not model.up._forward_hooks


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "half": (lambda: prepared("w4a16").bfloat16(), {}, r"up\.weight and 7 more parameters are not float32"),
    "unprepared": (Small, {}, "nothing to train under: the model is not prepared; run recoup.prepare first"),
    "uncalibrated": (
        lambda: prepare(Small(), resolve(Small(), "w8a8-static")), {}, r"up\.input: its range is not known"),
    "no labels": (prepared, {"loss": "task"}, "the loss needs loss; the model returns logits: give"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused(build: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(build(), batches(1), settings(**fields))


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="training: no batches"):
        train(prepared(), [])


def test_a_bare_tensor_is_distilled_too() -> None:
    model = ptq(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "w2a16", [torch.randn(4, WIDTH)])
    seen: list[Mapping[str, float]] = []
    mixed = torch.randn(4, WIDTH)  # inputs in a few directions leave the rounding something to win
    data = [torch.randn(64, 4) @ mixed for _ in range(9)]
    train(model, data[1:], settings(steps=40, evaluate_every=10), held_out=data[:1], record=seen.append)
    assert min(entry["held_out"] for entry in seen[1:] if "held_out" in entry) < seen[0]["held_out"]


def test_a_gradient_that_is_not_finite_is_traced_to_its_parameter() -> None:
    """The square root of 0 is finite, and its slope is not."""

    class Root(Small):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            hidden = self.down(torch.relu(self.norm(self.up(x))))
            return {"loss": (self.head(hidden).sum() - self.head(hidden).sum().detach()).abs().sqrt()}

    model = Root()
    calibrate(prepare(model, resolve(model, "w4a16")), batches(1))
    with pytest.raises(
        NonFiniteLossError, match=r"step 1: the loss is finite, but its gradient is nan; first in head\.bias"
    ):
        train(model, batches(1), settings(loss="task"))


def test_a_budget_is_for_a_ladder() -> None:
    with pytest.raises(
        ValueError,
        match=r"budget: 60 seconds of re-tuning asked, and a training asks no gate that it could miss; use "
        r"recoup\.recover, or leave the budget out",
    ):
        train(prepared(), batches(1), settings(budget="1m"))


def test_it_stops_early_after_so_many_looks_without_a_lower_loss() -> None:
    model, data, held_out = prepared(), batches(4), batches(1)
    seen: list[Mapping[str, float]] = []
    train(model, data, settings(steps=20, learning_rate=1e3, early_stop=2), held_out=held_out,
          record=seen.append)  # fmt: skip
    assert [entry["step"] for entry in seen] == [0, 1, 2, 3, 4]  # looks are at every second step
    assert [entry["step"] for entry in seen if "stopped_early" in entry] == [4]
    seen.clear()
    train(model, data, settings(steps=4, learning_rate=1e3, early_stop=2), held_out=held_out,
          record=seen.append)  # fmt: skip
    assert not any("stopped_early" in entry for entry in seen)  # it was the last step in any case


def test_looks_before_quantization_trains_are_no_failures() -> None:
    seen: list[Mapping[str, float]] = []
    given = settings(steps=20, learning_rate=1e3, early_stop=2, start_step=6)
    train(prepared(), batches(4), given, held_out=batches(1), record=seen.append)
    assert [entry["step"] for entry in seen if "stopped_early" in entry] == [10]  # looks at 8 and 10


class Counting(nn.Module):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None: ...


def test_state_that_is_no_tensor_is_refused() -> None:
    model = prepared()
    model.counting = Counting()
    with pytest.raises(ValueError, match=r"^counting\._extra_state: state of type int cannot be kept"):
        train(model, batches(1), settings())


def test_an_early_stop_needs_something_to_look_at() -> None:
    with pytest.raises(
        ValueError, match="early_stop: looks at held-out batches and there are none; pass held"
    ):
        train(prepared(), batches(1), settings(early_stop=1))
