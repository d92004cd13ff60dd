"""Convolutions, and GPT-2's linear layer: the equation for every geometry, from float to codes."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn import (
    CODED_MODULES,
    CodedConv1D,
    CodedConv1d,
    CodedConv2d,
    CodedConv3d,
    CodedLinear,
    QuantConv1D,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    quant_type,
    quantization_off,
    seen_bias,
)
from recoup.numerics import dequantize, extrema, quantize
from recoup.schemes import PRESETS, Scheme
from tests.models import SCHEMES, WIDTH, name_of

W8A8 = PRESETS["w8a8-ort-static"]
LEARNED = replace(
    W8A8,
    name="learned",
    weights=replace(W8A8.weights, ranges="learned"),
    inputs=replace(PRESETS["w8a8-static"].inputs, ranges="learned"),
)
PER_TENSOR = [
    scheme
    for scheme in (*SCHEMES, LEARNED)
    if scheme.inputs is None
    or (scheme.inputs.granularity.rows, scheme.inputs.granularity.columns) == (None,) * 2
]
CHANNELS, OUT = 4, 8

GEOMETRY = [
    {
        "padding": padding,
        "padding_mode": mode,
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": groups != 2,
    }
    for padding, mode, stride, dilation, groups in product(
        (0, 2, "same"), ("zeros", "reflect", "replicate", "circular"), (1, 2), (1, 2), (1, 2, CHANNELS)
    )
    if not (padding == "same" and stride > 1)
]


def geometry_name(geometry: Any) -> str:
    return "-".join(map(str, geometry.values())) if isinstance(geometry, dict) else name_of(geometry)


KINDS = {
    1: (nn.Conv1d, QuantConv1d, CodedConv1d, F.conv1d, (2, CHANNELS, 9)),
    2: (nn.Conv2d, QuantConv2d, CodedConv2d, F.conv2d, (2, CHANNELS, 9, 8)),
    3: (nn.Conv3d, QuantConv3d, CodedConv3d, F.conv3d, (2, CHANNELS, 6, 5, 7)),
}


def seen(module: Any, x: Tensor) -> Any:
    """With the range of x, by the definitions."""
    quantizer = module.input_quantizer
    if not isinstance(quantizer, nn.Identity) and quantizer.needs_calibration:
        quantizer.set_range(*extrema(x.flatten(1), quantizer.spec.granularity))
    return module


def on_lattice(x: Tensor, quantizer: Any) -> Tensor:
    """x, through codes: the definition of what a fake quantizer does."""
    view = x.detach().flatten(1)
    qparams, spec = quantizer.qparams(view), quantizer.spec
    return dequantize(quantize(view, qparams, spec), qparams, spec).reshape(x.shape)


def padded(x: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """By hand: what stands before and after every axis."""
    before_and_after: list[int] = []
    for axis in reversed(range(x.ndim - 2)):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            before_and_after += [total // 2, total - total // 2]
        else:
            before_and_after += [module.padding[axis]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, before_and_after, mode=mode)


@pytest.mark.parametrize("geometry", GEOMETRY, ids=geometry_name)
@pytest.mark.parametrize("axes", KINDS)
def test_every_geometry_is_the_equation_from_float_to_codes(axes: int, geometry: dict[str, Any]) -> None:
    kind, twin, coded_kind, convolution, shape = KINDS[axes]
    module, x = kind(CHANNELS, OUT, 3, **geometry), torch.randn(shape)
    expected_float = module(x)
    prepared = seen(twin.from_float(module, W8A8, "layer"), x)
    with quantization_off(prepared):
        assert torch.equal(prepared(x), expected_float)

    inputs, weight = (
        on_lattice(x, prepared.input_quantizer),
        on_lattice(module.weight, prepared.weight_quantizer),
    )
    expected = convolution(
        padded(inputs, module), weight, module.bias, module.stride, 0, module.dilation, module.groups
    )
    y = prepared(x)
    # Products and sums of the same values; with zeros inside the kernel torch may add in another order.
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, expected_float, atol=1e-5)

    coded = coded_kind(prepared)
    assert torch.equal(coded(x), y)
    assert coded.weight.codes.shape == (OUT, CHANNELS // module.groups * 3**axes)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(coded, name) == getattr(module, name)
    assert coded.padding_mode == module.padding_mode
    assert padded(x, module).shape == F.pad(x, coded.edges).shape


@pytest.mark.parametrize("scheme", PER_TENSOR, ids=name_of)
@pytest.mark.parametrize("axes", KINDS)
def test_every_scheme_with_one_input_scale_is_the_equation(axes: int, scheme: Scheme) -> None:
    kind, twin, coded_kind, convolution, _ = KINDS[axes]
    module, x = kind(WIDTH, WIDTH, 1), torch.randn(2, WIDTH, *(3,) * axes)
    prepared = seen(twin.from_float(module, scheme, "layer"), x)
    inputs = x if scheme.inputs is None else on_lattice(x, prepared.input_quantizer)
    expected = convolution(inputs, on_lattice(module.weight, prepared.weight_quantizer), seen_bias(prepared))
    y = prepared(x)
    assert torch.equal(y, expected)
    assert torch.equal(coded_kind(prepared)(x), y)


@pytest.mark.parametrize("axes", KINDS)
def test_gradients_reach_the_weight_the_bias_the_input_and_learned_scales(axes: int) -> None:
    kind, twin, _, _, shape = KINDS[axes]
    module = twin.from_float(kind(CHANNELS, OUT, 3), LEARNED, "layer")
    x = torch.randn(shape, requires_grad=True)
    seen(module, x.detach())(x).square().sum().backward()
    leaves = {"x": x, **dict(module.named_parameters())}
    assert set(leaves) == {"x", "weight", "bias", "weight_quantizer.scale", "input_quantizer.scale"}
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad.count_nonzero() > 0


def test_the_gradient_of_the_weight_is_the_convolutions_where_nothing_saturates() -> None:
    scheme = replace(W8A8, weights=replace(W8A8.weights, gradient="pass-through"), inputs=None)
    module, x = nn.Conv2d(CHANNELS, OUT, 3, groups=2), torch.randn(2, CHANNELS, 9, 8)
    module(x).sum().backward()
    expected, module.weight.grad = module.weight.grad, None
    QuantConv2d.from_float(module, scheme, "layer")(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, expected)


def test_a_weight_in_channels_last_is_the_float_modules_when_switched_off() -> None:
    module = nn.Conv2d(CHANNELS, OUT, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, CHANNELS, 9, 8).to(memory_format=torch.channels_last)
    prepared = seen(QuantConv2d.from_float(module, W8A8, "layer"), x)
    with quantization_off(prepared):
        assert torch.equal(prepared(x), module(x))
    assert torch.equal(CodedConv2d(prepared)(x), prepared(x))


def test_one_image_without_a_batch_axis() -> None:
    module, x = nn.Conv2d(CHANNELS, OUT, 3), torch.randn(CHANNELS, 9, 8)
    prepared = seen(QuantConv2d.from_float(module, W8A8, "layer"), x)
    assert torch.equal(CodedConv2d(prepared)(x), prepared(x))
    assert prepared(x).shape == (OUT, 7, 6)


@pytest.mark.parametrize("axes", KINDS)
def test_an_input_without_a_range_says_which(axes: int) -> None:
    kind, twin, _, _, shape = KINDS[axes]
    with pytest.raises(RuntimeError, match=r"^layer\.input: its range is not known; run recoup\.calibrate"):
        twin.from_float(kind(CHANNELS, OUT, 3), W8A8, "layer")(torch.randn(shape))


def transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(2 * WIDTH, WIDTH)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 3, WIDTH)], ids=str)
def test_gpt2s_linear_layer_is_the_equation(scheme: Scheme, shape: tuple[int, ...]) -> None:
    module, x = transposed(), torch.randn(shape)
    prepared = QuantConv1D.from_float(module, scheme, "layer")
    linear = nn.Linear(WIDTH, 2 * WIDTH)
    linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
    twin = quant_type(linear).from_float(linear, scheme, "layer")
    for layer in (prepared, twin):
        quantizer = layer.input_quantizer
        if not isinstance(quantizer, nn.Identity) and quantizer.needs_calibration:
            granularity = quantizer.spec.granularity
            if quantizer.spec.ranges == "dynamic":
                granularity = replace(granularity, rows=None, columns=None)
            quantizer.set_range(*extrema(x.reshape(-1, WIDTH), granularity))
    y = prepared(x)
    torch.testing.assert_close(y, twin(x))  # one is summed along rows of memory, the other along columns
    coded = CODED_MODULES[QuantConv1D](prepared)
    assert isinstance(coded, CodedLinear)
    assert type(coded) is CodedConv1D
    assert torch.equal(coded(x), y)
    assert torch.equal(coded.weight.codes, CodedLinear(twin).weight.codes)
    assert (coded.in_features, coded.out_features) == (WIDTH, 2 * WIDTH)
    with quantization_off(prepared):
        assert torch.equal(prepared(x), module(x))


def test_gpt2s_linear_layer_gets_the_gradient_of_its_own_shape() -> None:
    module = QuantConv1D.from_float(transposed(), LEARNED_WEIGHTS, "layer")
    module(torch.randn(3, WIDTH)).square().sum().backward()
    assert module.weight.grad.shape == (WIDTH, 2 * WIDTH)
    assert all(parameter.grad.count_nonzero() > 0 for parameter in module.parameters())


LEARNED_WEIGHTS = replace(PRESETS["w4a16"], weights=replace(PRESETS["w4a16"].weights, ranges="learned"))
