"""Norms inside of quantized layers, in training: what was measured is what ships, and no code is lost."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import add_batch_norm, add_lora, calibrate, convert, merge_batch_norm, prepare, resolve, train
from recoup.calibrate import gptq
from recoup.ladder.refusals import check_rungs
from recoup.nn import folded_norm, is_coded, is_prepared, norm_of
from recoup.numerics import E8M0, per_channel, per_group, per_tensor
from recoup.schemes import PRESETS, Scheme
from recoup.schemes.parse import parse
from recoup.schemes.training import TrainSettings
from recoup.train.batch_norm import reestimate
from recoup.train.fingerprint import fingerprint
from recoup.transforms import fuse
from tests.models import recipe, run, same

W8A8, W4A16 = PRESETS["w8a8-static"], PRESETS["w4a16"]


class Net(nn.Module):
    """A classifier of small images, each layer with its norm but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.second, self.other = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.other(self.second(torch.relu(self.norm(self.first(x))))))
        logits = self.head(self.dropout(x.mean(dim=(2, 3))))
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def batches(count: int, samples: int = 8) -> list[dict[str, Tensor]]:
    drawn = [torch.randn(samples, 4, 6, 6) + 1 for _ in range(count)]
    return [{"x": x, "labels": x.mean(dim=(2, 3)).argmax(1)} for x in drawn]


def prepared(scheme: Scheme = W8A8, ranges: str | None = None) -> Net:
    """With norms folded and remembered."""
    torch.manual_seed(0)
    model = Net()
    for batch in batches(5):
        model(**batch)
    x = {"x": batches(1)[0]["x"]}
    prepare(fuse(model.eval(), x), resolve(model, recipe(scheme, weight_ranges=ranges)), impl="fused")
    return calibrate(model, [x])  # pyright: ignore[reportReturnType]


def settings(**fields: Any) -> TrainSettings:
    given = {"steps": 6, "learning_rate": 1e-2, "evaluate_every": 2, "batch_norm": {"reestimate": 2}}
    return TrainSettings.model_validate(given | fields)


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("ranges", ["static", "learned", "dynamic"])
def test_what_was_measured_is_what_ships(ranges: str) -> None:
    model, told = prepared(ranges=ranges), list[Mapping[str, float]]()
    names, held_out = list(model.state_dict()), batches(2)
    before = mean_loss(model, held_out)
    train(model, batches(3), settings(loss="task"), held_out=held_out, record=told.append)
    measured = [entry["held_out"] for entry in told if "held_out" in entry]
    assert [entry["step"] for entry in told] == [*range(7), 6]
    assert (len(measured), told[-1]["reestimated"]) == (5, 2)
    assert measured[0] == before
    assert min(measured) == mean_loss(model, held_out)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(run(model, held_out[0]), run(convert(copy.deepcopy(model)), held_out[0]))


def test_without_held_out_batches_the_reestimated_statistics_ship() -> None:
    found: list[nn.Module] = []
    for count in (0, 2):
        torch.manual_seed(1)
        given = settings(loss="logits-kl", batch_norm={"reestimate": count})
        found.append(train(prepared(), batches(3), given))
    one, other = (codes(model) for model in found)
    assert all(map(torch.equal, one, other))
    assert not torch.equal(found[0].first.bias, found[1].first.bias)


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    return sum(float(model(**batch)["loss"]) for batch in data) / len(data)


@pytest.mark.parametrize(
    ("loss", "freeze", "moved"), [("task", 4, 4), ("logits-kl", None, 6), ("logits-kl", 0, 0)]
)
def test_statistics_stay_after_so_many_steps(loss: str, freeze: int | None, moved: int) -> None:
    """Also where a teacher is followed, and all else is in evaluation mode."""
    model = prepared()
    before = folded_norm(model.first).num_batches_tracked.clone()
    train(model, batches(3), settings(loss=loss, batch_norm={"freeze": freeze, "reestimate": 0}))
    assert folded_norm(model.first).num_batches_tracked - before == moved


def test_frozen_from_the_start_it_trains_the_folded_layer() -> None:
    """Of the first step: the same loss to the bit as with norms that stay folded."""
    found: list[list[float]] = []
    for batch_norm in (None, {"freeze": 0}):
        told, model = list[Mapping[str, float]](), prepared()
        torch.manual_seed(1)
        train(model, batches(3), settings(loss="logits-kl", batch_norm=batch_norm), record=told.append)
        found.append([entry["loss"] for entry in told if "loss" in entry])
    assert found[0][0] == found[1][0]
    assert found[0] != found[1]


def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    data = batches(5)

    def trained(folder: Path | None, stop: int | None = None) -> str:
        def record(entry: Mapping[str, float]) -> None:
            if entry["step"] == stop:
                raise KeyboardInterrupt

        model = prepared()
        torch.manual_seed(1)
        given = settings(loss="task", checkpoint_every=2, batch_norm={"freeze": 4, "reestimate": 2})
        train(model, data[:3], given, held_out=data[3:], record=record, checkpoints=folder)
        return fingerprint(model.state_dict())

    for stop in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, stop)
    assert trained(tmp_path) == trained(None) == trained(tmp_path)


W4 = replace(W4A16, name="w4", weights=replace(W4A16.weights, granularity=per_channel))
LATTICES = {
    "per channel": (replace(W4, weights=replace(W4.weights, granularity=per_channel)), True),
    "in groups": (replace(W4, weights=replace(W4.weights, granularity=per_group(4))), True),
    "learned": (replace(W4, weights=replace(W4.weights, ranges="learned")), True),
    "dynamic": (replace(W4, weights=replace(W4.weights, ranges="dynamic")), True),
    "affine": (replace(W4, weights=replace(W4.weights, scale_rule="affine")), True),
    "learned affine": (
        replace(W4, weights=replace(W4.weights, scale_rule="affine", ranges="learned")),
        True,
    ),
    "min-max": (replace(W4, weights=replace(W4.weights, scale_rule="min-max")), True),
    "integer bias": (PRESETS["w7a8-ort-static"], True),
    "per tensor": (replace(W4, weights=replace(W4.weights, granularity=per_tensor)), False),
    "powers of two": (
        replace(W4, weights=replace(W4.weights, scale_format=E8M0, scale_rule="pow2")),
        False,
    ),
}


@pytest.mark.parametrize("lattice", LATTICES)
def test_reestimation_moves_no_code(lattice: str) -> None:
    scheme, follows = LATTICES[lattice]
    model = add_batch_norm(prepared(scheme))
    with torch.no_grad():
        model.first.weight.mul_(0.7)  # as after some training
    before, norm = converted(model), copy.deepcopy(model.first.batch_norm)
    reestimate(model, [{"x": batch["x"] * 1.5} for batch in batches(3)])
    after = converted(model)
    for old, new in zip(before, after, strict=True):
        moved = old.weight.codes != new.weight.codes
        assert not moved.any() or follows
        assert within_rounding_of_a_border(old, moved)
    assert not torch.equal(model.first.batch_norm.running_mean, norm.running_mean)
    assert torch.equal(model.first.batch_norm.running_var, norm.running_var) is not follows
    assert model.first.batch_norm.num_batches_tracked == norm.num_batches_tracked
    assert not model.first.batch_norm.training


def converted(model: nn.Module) -> list[Any]:
    """The layers with codes of a copy, each with the matrix that they are of."""
    coded = convert(copy.deepcopy(model))
    for name, module in model.named_modules():
        if is_prepared(module):
            coded.get_submodule(name).matrix = module.matrix(module).detach()
    return [module for module in coded.modules() if is_coded(module)]


def codes(model: nn.Module) -> list[Tensor]:
    return [layer.weight.codes for layer in converted(model)]


def within_rounding_of_a_border(layer: Any, moved: Tensor) -> bool:
    """A position is a product of k and W over one of scale and sigma: four roundings of 2^-24, of 8 steps."""
    weight = layer.weight
    blocks = layer.matrix.double().unflatten(1, (weight.scale.shape[1], -1))
    position = (blocks - (0 if weight.offset is None else weight.offset[..., None])) / weight.scale[..., None]
    border = (position.flatten(1)[moved] - 0.5).frac().abs()
    return bool((torch.minimum(border, 1 - border) <= 8 * 4 * 2**-24).all())


def test_reestimated_statistics_are_torchs_over_these_batches() -> None:
    model = add_batch_norm(prepared())
    layer, data = copy.deepcopy(model.first), batches(4)
    plain = nn.BatchNorm2d(16, momentum=None)
    assert torch.equal(layer.batch_norm.weight, (layer.batch_norm.running_var + layer.batch_norm.eps).sqrt())
    with torch.no_grad():  # k is 1, and z = Q(W) x + b
        for batch in data:
            x, weight = layer.input_quantizer(batch["x"]), layer.weight_quantizer(layer.weight)
            plain(F.conv2d(x, weight, layer.bias))
    reestimate(model, data)
    torch.testing.assert_close(model.first.batch_norm.running_mean, plain.running_mean)
    torch.testing.assert_close(model.first.batch_norm.running_var, plain.running_var)


def test_norms_move_in_and_out_without_a_bit() -> None:
    model, x = prepared(), batches(1)[0]
    before = run(model, x)
    assert norm_of(add_batch_norm(model).second) is not None
    assert same(before, run(model, x))
    assert same(before, run(merge_batch_norm(model), x))
    assert norm_of(model.second) is None


def test_what_cannot_have_norms_says_what_to_do() -> None:
    model = prepared()
    message = r"^the model has no norms inside of its layers; give it some with recoup\.add_batch_norm$"
    with pytest.raises(ValueError, match=message):
        merge_batch_norm(model)
    for state in (Net(), convert(copy.deepcopy(model))):
        word = "converted" if state is not None and not isinstance(state.first, nn.Conv2d) else "not prepared"
        message = rf"^batch_norm: the model is {word}; norms go into layers between recoup\.prepare and "
        with pytest.raises(ValueError, match=message):
            add_batch_norm(state)
    message = (
        r"^batch_norm: no norm was folded into a quantized layer; call recoup\.transforms\.fuse\(model, "
        r"batch\) before recoup\.prepare, or leave batch_norm out$"
    )
    unfused = nn.Sequential(nn.Linear(32, 32))
    prepare(unfused, resolve(unfused, "w4a16"))
    with pytest.raises(ValueError, match=message):
        add_batch_norm(unfused)
    with pytest.raises(ValueError, match=message):
        train(unfused, [torch.randn(2, 32)], settings())
    add_batch_norm(model)
    message = r"^batch_norm: the model has norms inside of its layers; merge them first, with recoup\.merge"
    with pytest.raises(ValueError, match=message):
        add_batch_norm(model)


def linear() -> nn.Module:
    x = torch.randn(4, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).eval()
    prepare(fuse(model, x), resolve(model, "w4a16"))
    return model


def test_adapters_and_norms_do_not_meet() -> None:
    with pytest.raises(
        ValueError, match=r"^batch_norm: 0 has an adapter, whose layer is frozen with its norm; "
    ):
        add_batch_norm(add_lora(linear()))
    with pytest.raises(
        ValueError, match=r"^lora: 0 has its norm inside, which an adapter's frozen layer would"
    ):
        add_lora(add_batch_norm(linear()))
    with pytest.raises(ValueError, match=r"^0\.weight: gptq moves the weight, and a norm scales it; call "):
        gptq(add_batch_norm(linear()), [torch.randn(4, 32)])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": ({"lora": {}}, "batch_norm asked, and adapters train, which leaves norms as they are"),
    "scales": ({"parameters": "scales"}, "batch_norm asked, and scales alone train, which leaves norms"),
    "recomputation": (
        {"activation_checkpointing": True},
        "batch_norm and activation_checkpointing asked; computing twice would move statistics twice",
    ),
    "too late": (
        {"batch_norm": {"freeze": 6}},
        "batch_norm.freeze 6 asked of 6 steps, so none would freeze; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_without_meaning_are_refused(case: str) -> None:
    fields, message = REFUSED[case]
    given = {"steps": 6, "batch_norm": {}} | fields
    with pytest.raises(ValueError, match=message):
        parse(TrainSettings, given, "train")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(
        ValueError, match=r"^batch_norm: asked in 2 processes, and each would have statistics of"
    ):
        train(prepared(), batches(2), settings())


def test_a_run_refuses_before_the_first_measurement() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    asked = recipe("w4a16", train={"batch_norm": {}, "loss": "logits-kl"}, calibration={"samples": 2})
    with pytest.raises(ValueError, match=r"^batch_norm: no norm was folded into a quantized layer; "):
        check_rungs(model, resolve(model, asked), asked, [torch.randn(2, 32)], [torch.randn(2, 32)] * 2)
