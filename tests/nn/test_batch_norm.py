"""A norm inside of a quantized layer: Q(k W) ships, and a batch is normalised by its own statistics."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import calibrate, convert, prepare, resolve
from recoup.nn import FakeQuantizer, attach, folded_norm, merge, quantization_off
from recoup.nn.batch_norm import factor_of
from recoup.numerics import per_channel
from recoup.schemes import PRESETS, Scheme
from recoup.transforms import fuse
from recoup.validate.modes import evaluation
from recoup.validate.symptoms import of_an_evaluation
from tests.models import recipe, run, same
from tests.transforms.test_fuse import LAYERS, trained

# A sum of n float32 products is off by u sqrt(n), u = 2^-24, of their size (Higham 2002, section 4.2); here
# n <= 400, and dividing by k and by sigma makes of it less than 8 times as much.
CLOSE = 2**-24 * 20 * 8
W4 = replace(PRESETS["w4a16"], name="w4", weights=replace(PRESETS["w4a16"].weights, granularity=per_channel))
W7A8 = PRESETS["w7a8-ort-static"]  # with an integer bias


def layered(
    kind: str = "conv2d",
    scheme: Scheme = W4,
    ranges: str = "static",
    *,
    affine: bool = True,
    impl: Any = "fused",
) -> tuple[nn.Sequential, Tensor]:
    """A layer with its norm inside, of which k is anything, and an input."""
    build, build_norm, shape = LAYERS[kind]
    torch.manual_seed(0)
    x = 3 * torch.randn(shape) + 1
    model = trained(nn.Sequential(build(True), build_norm(affine), nn.ReLU()), x, 2 * x)
    prepare(fuse(model, x), resolve(model, recipe(scheme, weight_ranges=ranges)), impl=impl)
    calibrate(model, [x])
    attach(model[0])
    moved(model[0].batch_norm)
    return model, x


@torch.no_grad()
def moved(norm: nn.Module) -> None:
    """As after some training: k is not 1, and negative somewhere."""
    norm.weight.mul_(torch.empty_like(norm.weight).uniform_(0.8, 1.2))
    norm.weight[1] *= -1
    norm.bias.add_(0.1)
    norm.running_mean.add_(torch.randn_like(norm.running_mean))
    norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= CLOSE * expected.norm())


@torch.no_grad()
def off_the_ties(layer: Any) -> None:
    """Let k W lie near the middle of codes, so that float32 and float64 decide them alike."""
    scale, k = layer.weight_quantizer.scale, factor_of(layer.batch_norm)[:, None]
    codes = torch.randint(-6, 7, layer.matrix(layer).shape)
    layer.weight.copy_(layer.stored((codes + 0.3 * torch.rand(codes.shape)) * scale / k))


CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "depthwise": lambda x, w, b: F.conv2d(x, w, b, groups=4),
    "conv1d": lambda x, w, b: F.conv1d(x, w, b, padding="same"),
    "conv3d": lambda x, w, b: F.conv3d(x, w, b, groups=2),
    "transposed": lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=2),
    "linear": F.linear,
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_training_is_the_composition_in_float64(kind: str, momentum: float | None) -> None:
    model, x = layered(kind)
    layer = model[0]
    norm, grad = layer.batch_norm, torch.randn_like(layer(x))
    norm.momentum = momentum
    off_the_ties(layer)
    exact = {name: value.detach().double() for name, value in layer.state_dict().items()}
    for name in ("weight", "batch_norm.weight", "batch_norm.bias"):
        exact[name].requires_grad_()
    seen = x.double().requires_grad_()

    # y = conv(x, Q(k W)), z = y / k + b, out = gamma (z - mean_B) / sigma_B + beta
    rows = 0 if kind != "transposed" else 1
    w, gamma = exact["weight"], exact["batch_norm.weight"]
    k = gamma / (exact["batch_norm.running_var"] + norm.eps).sqrt()
    shape = [1] * w.ndim
    if kind == "transposed":  # (inputs, outputs of a group): channels 0 to 3 belong to inputs 0 and 1
        of_channel, scale = (
            v.reshape(2, 1, 4, 1, 1).expand(2, 2, 4, 1, 1).reshape(4, 4, 1, 1)
            for v in (k, exact["weight_quantizer.scale"])
        )
    else:
        shape[rows] = -1
        of_channel, scale = k.reshape(shape), exact["weight_quantizer.scale"].reshape(shape)
    folded = of_channel * w
    rounded = folded + ((folded / scale).round() * scale - folded).detach()
    y = CONVOLUTIONS[kind](seen, rounded, None)
    along = [1, -1, *[1] * (y.ndim - 2)]
    z = y / k.reshape(along) + exact["bias"].reshape(along)
    axes = [0, *range(2, z.ndim)]
    variance, mean = torch.var_mean(z, axes, correction=0)
    out = (z - mean.reshape(along)) / (variance + norm.eps).sqrt().reshape(along)
    out = out * gamma.reshape(along) + exact["batch_norm.bias"].reshape(along)
    (out * grad).sum().backward()

    model.train()
    x.requires_grad_()
    found = layer(x)
    (found * grad).sum().backward()
    assert close(found, out)
    assert close(x.grad, seen.grad)
    assert close(layer.weight.grad, w.grad)
    assert close(norm.weight.grad, gamma.grad)
    assert close(norm.bias.grad, exact["batch_norm.bias"].grad)
    assert layer.bias.grad is None
    count = z.numel() / z.shape[1]
    share = momentum or 1 / (1 + int(exact["batch_norm.num_batches_tracked"]))
    for name, batch in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
        before = exact[f"batch_norm.{name}"]
        assert close(getattr(norm, name), (1 - share) * before + share * batch)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_module_agrees(training: bool) -> None:
    """As far as rounding goes: it divides the output by k, where here the weight is, and adds no folded bias.

    With k = 0 it returns NaN.
    """
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import QConfig

    model, x = layered("depthwise")
    layer = model[0]
    off_the_ties(layer)
    quantizer = copy.deepcopy(layer.weight_quantizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        qconfig = QConfig(activation=nn.Identity, weight=lambda: quantizer)
        theirs = ConvBn2d(4, 4, 3, groups=4, bias=True, qconfig=qconfig)
    state = {name.replace("batch_norm", "bn"): value for name, value in layer.state_dict().items()}
    renamed = {name.replace("weight_quantizer", "weight_fake_quant"): value for name, value in state.items()}
    theirs.load_state_dict(renamed, strict=True)
    layer.train(training)
    theirs.train() if training else theirs.freeze_bn_stats()
    found, expected = layer(x), theirs(x)
    grad = torch.randn_like(found)
    for output in (found, expected):
        (output * grad).sum().backward()
    assert close(found, expected)
    assert close(layer.weight.grad, theirs.weight.grad)
    assert close(layer.batch_norm.weight.grad, theirs.bn.weight.grad)
    assert close(layer.batch_norm.running_var, theirs.bn.running_var)
    assert close(layer.batch_norm.running_mean, theirs.bn.running_mean)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_and_converted_compute_the_same_bits(kind: str) -> None:
    for scheme, ranges in [(W4, "static"), (W7A8, "learned")]:
        model, x = layered(kind, scheme, ranges)
        inside = run(model, x)
        shared = {id(parameter): parameter for parameter in model.parameters()}  # as `export` copies
        converted = convert(copy.deepcopy(model, shared))
        assert same(inside, run(model, x))
        merge(model[0])
        assert model[0].batch_norm is None
        assert model[0].bias.requires_grad
        assert same(inside, run(model, x))
        assert same(inside, run(converted, x))
        assert same(inside, run(convert(model), x))


def test_in_float_it_is_the_float_model() -> None:
    model, x = layered()
    with quantization_off(model):
        found = run(model, x)
        merge(model[0])
        assert same(found, run(model, x))


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_attaching_changes_no_bit(kind: str, affine: bool, impl: Any) -> None:
    model, x = layered(kind, affine=affine, impl=impl)
    merge(model[0])
    before, layer = run(model, x), model[0]
    attach(layer)
    assert torch.equal(factor_of(layer.batch_norm), torch.ones(layer.batch_norm.num_features))
    assert same(before, run(model, x))
    assert not layer.bias.requires_grad
    assert layer.batch_norm.weight.requires_grad is affine


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_is_normalised_as_before_folding(kind: str, affine: bool) -> None:
    build, build_norm, shape = LAYERS[kind]
    x = 3 * torch.randn(shape) + 1
    model = nn.Sequential(build(True), build_norm(affine), nn.Identity())
    model[1].momentum, model[1].eps = None, 1e-30  # which is in other units once the layer is folded
    trained(model, x, 2 * x)
    before = copy.deepcopy(model).train()
    prepare(fuse(model, x), resolve(model, W4))
    attach(model[0])
    norm = model.train()[0].batch_norm
    assert (norm.momentum, norm.eps, int(norm.num_batches_tracked)) == (None, 1e-30, 2)
    with quantization_off(model):
        assert close(model(x), before(x))
    assert int(norm.num_batches_tracked) == 3


def test_a_channel_with_k_zero_is_that_of_the_float_layer() -> None:
    model, x = layered()
    layer = model.train()[0]
    with torch.no_grad():
        layer.batch_norm.weight[2] = 0
    plain = copy.deepcopy(layer)
    found = layer(x)
    assert torch.equal(found[:, 2], layer.batch_norm.bias[2].expand_as(found[:, 2]))
    (found * torch.arange(found.numel()).reshape(found.shape)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)

    z = plain._conv_forward(x, plain.weight, plain.bias)
    norm = plain.batch_norm
    float_output = F.batch_norm(
        z, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, norm.eps
    )
    (float_output * torch.arange(found.numel()).reshape(found.shape)).sum().backward()
    assert layer.batch_norm.weight.grad[2] != 0
    assert close(layer.batch_norm.weight.grad[2], norm.weight.grad[2])
    assert close(layer.batch_norm.running_var[2], norm.running_var[2])
    assert same(run(model.eval(), x), run(convert(copy.deepcopy(model)), x))


def test_a_checkpoint_loads_strictly_to_the_same_bits() -> None:
    model, x = layered(ranges="learned")
    other, _ = layered(ranges="learned")
    moved(model[0].batch_norm)
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert same(run(model, x), run(other, x))
    assert same(run(model.train(), x), run(other.train(), x))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_in_training_mode_it_is_caught_at_an_evaluation() -> None:
    model, x = layered()
    model[0].batch_norm.train()
    tracked = model[0].batch_norm.num_batches_tracked.clone()
    message = (
        r"^0\.batch_norm: a BatchNorm2d runs in training mode, so its statistics come from the test batches "
        r"and are moved by them; call model\.eval\(\) in evaluate$"
    )
    with evaluation(model), pytest.raises(ValueError, match=message):
        model(x)
    assert model[0].batch_norm.num_batches_tracked == tracked
    assert [(s.module, s.what) for s in of_an_evaluation(model)] == [("0.batch_norm", "training mode")]
    model.eval()
    with evaluation(model):
        model(x)


def test_other_norms_stay_as_they_are() -> None:
    x = torch.randn(4, 4, 5, 5)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.ReLU()).eval()
    prepare(fuse(model, x), resolve(model, W4))
    assert folded_norm(model[0]) is None
    assert isinstance(model[1], nn.GroupNorm)
    assert isinstance(model[2], nn.BatchNorm2d)


def test_scales_follow_rows_and_codes_stay() -> None:
    spec = replace(W4.weights, scale_rule="min-max")
    quantizer = FakeQuantizer(spec, rows=4, columns=64)
    weight = torch.randn(4, 64)
    quantizer.fit(weight)
    before, factor = quantizer(weight), torch.tensor([0.5, 2.0, 4.0, 1.0])  # exact in float32
    quantizer.stretch(factor)
    assert torch.equal(quantizer(weight * factor[:, None]), before * factor[:, None])
