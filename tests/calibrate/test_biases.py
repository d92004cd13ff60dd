"""Bias correction: means of outputs are the float ones, in the order of execution, and nothing else moves."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recoup
from recoup.calibrate import calibrate, correct_biases, gptq
from recoup.nn import FakeQuantizer, quantization_off
from recoup.schemes import PRESETS
from recoup.train import add_batch_norm
from recoup.train.teacher import float_copy
from tests.models import MODELS, Row, built, name_of, run


def means(model: nn.Module, batch: Any, layers: list[str]) -> dict[str, Tensor]:
    """Of every channel that these modules make."""
    found: dict[str, Tensor] = {}
    for name in layers:
        layer: Any = model.get_submodule(name)
        axes = len(getattr(layer, "kernel_size", ()))

        def see(_: nn.Module, __: Any, y: Tensor, name: str = name, axes: int = axes) -> None:
            found[name] = y.detach().double().transpose(0, y.ndim - 1 - axes).flatten(1).mean(dim=1)

        layer.register_forward_hook(see)
    with torch.no_grad():
        run(model, batch)
    return found


PAIRS = [
    (row, scheme)
    for row in MODELS
    for scheme in ("w4a16", "w8a8-ort-static")
    if row.refused(PRESETS[scheme]) is None
]


@pytest.mark.parametrize(("row", "scheme"), PAIRS, ids=name_of)
def test_every_layer_with_a_bias_has_the_mean_that_it_has_in_float(row: Row, scheme: str) -> None:
    model = built(row)
    batch = row.batch(16)
    prepared = calibrate(recoup.prepare(model, recoup.resolve(model, scheme)), [batch])
    layers = [
        name
        for name, module in prepared.named_modules()
        if isinstance(getattr(module, "weight_quantizer", None), FakeQuantizer)
        and getattr(module, "bias", None) is not None
    ]
    if row.name == "shared":
        layers.remove("first")  # which a pass runs twice
    if not layers:
        with pytest.raises(ValueError, match=r"bias: no linear layer .* of its own; leave it out"):
            correct_biases(prepared, [batch])
        return
    state = copy.deepcopy(prepared.state_dict())
    with quantization_off(prepared):
        expected = means(copy.deepcopy(prepared), batch, layers)
    before = means(copy.deepcopy(prepared), batch, layers)
    assert correct_biases(prepared, [batch]) is prepared
    after = means(copy.deepcopy(prepared), batch, layers)
    for name in layers:
        off = (after[name] - expected[name]).abs().max()
        assert off < 1e-5 or off < (before[name] - expected[name]).abs().max() / 20, name
    moved = {name for name, value in prepared.state_dict().items() if not torch.equal(value, state[name])}
    assert moved <= {f"{name}.bias" for name in layers}
    assert moved


def prepared(scheme: str = "w2a16", *layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*(layers or [nn.Linear(64, 32)]))
    return recoup.prepare(model, recoup.resolve(model, scheme))


def test_batches_go_through_as_one_and_no_hook_and_no_mode_is_left() -> None:
    x = torch.rand(256, 64)
    whole = calibrate(prepared(), [x]).train()
    parts = copy.deepcopy(whole)
    correct_biases(whole, [x], samples=256)
    correct_biases(parts, list(x.split(64)), samples=256)
    assert torch.equal(whole[0].bias, parts[0].bias)
    assert whole.training
    assert whole[0].training
    assert not whole[0]._forward_hooks


def test_it_comes_on_top_of_gptq() -> None:
    x = torch.rand(128, 64) @ torch.rand(64, 64)
    model = calibrate(prepared(), [x])
    teacher = copy.deepcopy(model)
    with torch.no_grad(), quantization_off(teacher):
        y = teacher(x)
        before = (gptq(model, [x])(x) - y).square().mean()
        assert (correct_biases(model, [x], teacher=teacher)(x) - y).square().mean() < before


def test_what_is_frozen_and_shared_with_the_teacher_stays_the_teachers() -> None:
    x = torch.rand(128, 64)
    model = calibrate(prepared().requires_grad_(False), [x])
    teacher = float_copy(model)
    bias = model[0].bias
    assert teacher[0].bias is bias
    correct_biases(model, [x], teacher=teacher)
    assert teacher[0].bias is bias
    assert not torch.equal(model[0].bias, bias)
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(64, 32), [torch.rand(4, 64)], "bias: the model is not prepared; run recoup.prepare"),
        (prepared("w8a8-static"), [torch.rand(4, 64)], "0.input: its range is not known; run recoup.calib"),
        (prepared("w4a16", nn.Linear(64, 32, bias=False)), [], "has a bias of its own; leave it out"),
        (prepared(), [], "bias: no batches"),
        (
            prepared(),
            [torch.rand(4, 64), torch.rand(4, 2, 64)],
            "bias: the calibration batches have different",
        ),
    ],
)
def test_what_cannot_be_corrected_is_one_line(model: nn.Module, batches: Any, message: str) -> None:
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        correct_biases(model, batches)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_fewer_samples_than_asked_are_an_error() -> None:
    x = torch.rand(4, 64)
    with pytest.raises(ValueError, match="bias: 5 samples asked, 4 found; bring more, or ask for fewer"):
        correct_biases(calibrate(prepared(), [x]), [x], samples=5)


def test_a_norm_inside_of_the_quantizer_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.rand(4, 3, 6, 6)
    fused = recoup.transforms.fuse(model, x)
    calibrate(recoup.prepare(fused, recoup.resolve(fused, "w8a8-ort-static")), [x])
    add_batch_norm(fused)
    with pytest.raises(ValueError, match=r"0: a norm stands between it and its bias; call recoup\.merge_b"):
        correct_biases(fused, [x])
