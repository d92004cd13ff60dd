"""Transposed convolutions: the equation for every geometry, from float to codes, and what shares a weight."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recoup
from recoup.nn import CODED_MODULES, QUANT_MODULES, quantization_off
from recoup.schemes import PRESETS
from tests.models import recipe

W8A8 = PRESETS["w8a8-static"]
IN, OUT = 8, 4
KINDS = {
    1: (nn.ConvTranspose1d, (2, IN, 5)),
    2: (nn.ConvTranspose2d, (2, IN, 5, 4)),
    3: (nn.ConvTranspose3d, (2, IN, 3, 4, 2)),
}
GEOMETRY = [
    {
        "stride": stride,
        "padding": padding,
        "output_padding": stride - 1,
        "groups": groups,
        "bias": groups != 2,
    }
    | {"dilation": dilation}
    for stride, padding, groups, dilation in product((1, 2), (0, 1), (1, 2, 4), (1, 2))
]


def scattered(x: Tensor, weight: Tensor, module: Any) -> Tensor:
    """By hand, in float64: every input times every place of the kernel is added where it goes."""
    axes, groups = x.ndim - 2, module.groups
    stride, padding, dilation = module.stride, module.padding, module.dilation
    sizes = [
        (n - 1) * by - 2 * pad + step * (size - 1) + more + 1
        for n, by, pad, step, size, more in zip(
            x.shape[2:], stride, padding, dilation, module.kernel_size, module.output_padding, strict=True
        )
    ]
    wide = torch.zeros(len(x), module.out_channels, *(s + 2 * p for s, p in zip(sizes, padding, strict=True)))
    wide = nn.functional.pad(wide.double(), [0, 8] * axes)
    parts = x.double().chunk(groups, 1), weight.double().chunk(groups, 0)
    for place in product(*map(range, module.kernel_size)):
        sums = [torch.einsum("bi...,io->bo...", a, w[:, :, *place]) for a, w in zip(*parts, strict=True)]
        where = [
            slice(at * step, at * step + (n - 1) * by + 1, by)
            for at, step, n, by in zip(place, dilation, x.shape[2:], stride, strict=True)
        ]
        wide[:, :, *where] += torch.cat(sums, 1)
    found = wide[:, :, *(slice(pad, pad + size) for pad, size in zip(padding, sizes, strict=True))]
    return found if module.bias is None else found + module.bias.double().reshape(-1, *[1] * axes)


def ready(module: nn.Module, x: Tensor, scheme: Any = W8A8) -> Any:
    model = nn.Sequential(module)
    recoup.calibrate(recoup.prepare(model, recoup.resolve(model, scheme)), [x])
    return model[0]


def rounded(weight: Tensor, groups: int, scale: Tensor) -> Tensor:
    """By hand: the weight (inputs, outputs of a group, places), one scale for every output channel."""
    of_channel = scale.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    of_channel = of_channel.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return (weight / of_channel).round().clamp(-127, 127) * of_channel


@pytest.mark.parametrize("geometry", GEOMETRY, ids=lambda geometry: "-".join(map(str, geometry.values())))
@pytest.mark.parametrize("axes", KINDS)
@torch.no_grad()
def test_every_geometry_is_the_equation_from_float_to_codes(axes: int, geometry: dict[str, Any]) -> None:
    kind, shape = KINDS[axes]
    module, x = kind(IN, OUT, 3, **geometry), torch.randn(shape)
    as_float = module(x)
    prepared = ready(module, x)
    with quantization_off(prepared):
        assert torch.equal(prepared(x), as_float)
    scale = prepared.weight_quantizer.scale
    assert scale.shape == (OUT, 1)
    weight = rounded(module.weight, module.groups, scale)
    y = prepared(x)
    expected = scattered(prepared.input_quantizer(x), weight, module)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, as_float, atol=1e-5)
    coded = CODED_MODULES[type(prepared)](prepared)
    assert torch.equal(coded(x), y)
    assert coded.weight.codes.shape == (OUT, IN // module.groups * 3**axes)
    first = (
        module.weight[: IN // module.groups, 0].flatten() / scale[0]
    )  # all that output channel 0 sums over
    assert torch.equal(coded.weight.codes[0].float(), first.round())


@pytest.mark.parametrize("axes", KINDS)
@torch.no_grad()
def test_a_caller_may_ask_for_a_size(axes: int) -> None:
    kind, shape = KINDS[axes]
    module, x = kind(IN, OUT, 3, stride=2), torch.randn(shape)
    size = [2 * n + 2 for n in shape[2:]]
    wanted = module(x, output_size=size)
    prepared = ready(module, x)
    y = prepared(x, output_size=size)
    assert y.shape == wanted.shape != module(x).shape
    assert torch.equal(CODED_MODULES[type(prepared)](prepared)(x, size), y)


@pytest.mark.parametrize("axes", KINDS)
def test_gradients_reach_the_weight_the_bias_the_input_and_learned_scales(axes: int) -> None:
    kind, shape = KINDS[axes]
    learned = replace(
        W8A8,
        name="learned",
        weights=replace(W8A8.weights, ranges="learned"),
        inputs=replace(W8A8.inputs, ranges="learned"),
    )
    x = torch.randn(shape)
    module = ready(kind(IN, OUT, 3, groups=2), x, learned)
    module(x.requires_grad_()).square().sum().backward()
    leaves = {"x": x, **dict(module.named_parameters())}
    assert set(leaves) == {"x", "weight", "bias", "weight_quantizer.scale", "input_quantizer.scale"}
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad.count_nonzero() > 0


def test_groups_are_cut_along_the_sum_of_an_output_channel() -> None:
    module = nn.ConvTranspose2d(16, 4, 2, groups=2)
    prepared = QUANT_MODULES["torch.nn.ConvTranspose2d"].from_float(module, PRESETS["w4a16"], "layer")
    assert prepared.weight_quantizer.scale.shape == (4, 1)  # 8 channels x 4 places are one group of 32
    largest = module.weight[8:, 1].abs().max()  # the second group's second output is channel 3
    assert torch.isclose(prepared.weight_quantizer.scale[3, 0], largest / 7, rtol=0.2)


class Mirrored(nn.Module):
    """A decoder with the encoder's weight."""

    def __init__(self, other: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = nn.ConvTranspose2d(8, 8, 2, bias=False)
        self.decoder = other(8, 8, 2, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def test_two_that_share_a_weight_share_its_codes() -> None:
    rules = [("encoder", "w8a8-static"), ("decoder", "w8a8-static")]
    model, x = Mirrored(nn.ConvTranspose2d), torch.randn(2, 8, 4, 4)
    recoup.prepare(model, recoup.resolve(model, recipe("w8a8-static", *rules)))
    assert model.encoder.weight_quantizer is model.decoder.weight_quantizer
    y = recoup.calibrate(model, [x])(x)
    recoup.convert(model)
    assert model.encoder.weight is model.decoder.weight
    assert torch.equal(model(x), y)


def test_a_convolution_with_its_weight_reads_it_the_other_way_round() -> None:
    rules = [("encoder", "w8a8-static"), ("decoder", "w8a8-static")]
    message = (
        r"^encoder: its weight is tied to that of decoder, which reads it the other way round; write "
        r"untie: true \(recoup.transforms.untie\) to give each its own, or keep both in float with scheme: "
        "none$"
    )
    with pytest.raises(ValueError, match=message):
        recoup.resolve(Mirrored(nn.Conv2d), recipe("w8a8-static", *rules))
