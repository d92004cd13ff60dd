"""A bias in steps of the products: what training sees is what an int32 holds."""

import pytest
import torch
from torch import Tensor, nn

import recoup
from recoup.nn import QuantConv2d, quantization_off
from recoup.schemes import PRESETS, Scheme

SCHEME = PRESETS["w7a8-ort-static"]
BUILD = {
    "linear": (lambda: nn.Linear(16, 4), (8, 16)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (8, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (8, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (8, 3, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (8, 6, 5, 5)),
}
every_module = pytest.mark.parametrize(("build", "shape"), BUILD.values(), ids=BUILD)


def ready(module: nn.Module, x: Tensor, scheme: str = "w7a8-ort-static") -> nn.Module:
    model = nn.Sequential(module)
    recoup.prepare(model, recoup.resolve(model, scheme))
    return recoup.calibrate(model, [x])


def steps_of(module: QuantConv2d) -> Tensor:
    """By the definition: the input's scale times the weight's."""
    return (module.input_quantizer.scale.double() * module.weight_quantizer.scale.double()).flatten()


@every_module
def test_what_is_added_is_a_whole_number_of_steps(build: object, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = ready(build(), x)
    with_bias = model(x)
    bias, steps = model[0].bias.detach().clone(), steps_of(model[0])
    with torch.no_grad():
        model[0].bias.zero_()
    added = (with_bias - model(x)).detach()
    outputs = added.movedim(-1 if added.ndim == 2 else 1, -1).reshape(-1, 4)
    whole = (bias.double() / steps).round() * steps
    assert torch.allclose(outputs.double(), whole.expand_as(outputs), rtol=0, atol=4 * 2**-24 * 10)
    assert (whole - bias).abs().max() > 0


@every_module
def test_the_gradient_of_the_bias_passes_straight(build: object, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = ready(build(), x)
    y = model(x)
    y.sum().backward()
    assert torch.allclose(model[0].bias.grad, torch.full((4,), float(y.numel() // 4)))


@every_module
def test_without_quantization_the_bias_is_the_float_one(build: object, shape: tuple[int, ...]) -> None:
    module, x = build(), torch.randn(shape)
    plain = module(x)
    model = ready(module, x)
    with quantization_off(model):
        assert torch.equal(model(x), plain)


@every_module
def test_the_codes_are_what_the_converted_module_adds(build: object, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = ready(build(), x)
    steps = (model[0].input_quantizer.scale * model[0].weight_quantizer.scale).detach().flatten()
    trained = model(x)
    recoup.convert(model)
    codes = model[0].bias_codes
    assert codes.dtype == torch.int32
    assert torch.equal(codes.float() * steps, model[0].bias)
    assert torch.equal(model(x), trained)


def test_calibration_makes_room_for_the_bias_of_tiny_weights() -> None:
    """As a folded batch norm leaves them: 1 in steps of 1e-30 is no int32."""
    convolution, x = nn.Conv2d(3, 4, 3), torch.randn(8, 3, 9, 9)
    with torch.no_grad():
        convolution.weight[1] = 1e-30
        convolution.bias[1] = 1.0
    model = ready(convolution, x)
    y = model(x)
    assert torch.allclose(y[:, 1], torch.ones(()), rtol=2**-15)
    assert (recoup.convert(model)[0].bias_codes.abs() <= 2**30 * (1 + 2**-20)).all()


def test_a_bias_that_no_int32_holds_is_named() -> None:
    x = torch.randn(8, 3, 9, 9)
    model = ready(nn.Conv2d(3, 4, 3), x)
    with torch.no_grad():
        model[0].bias[1] = 1e9
    with pytest.raises(ValueError, match=r"^0: its bias is \S+ steps of its products, and an int32"):
        recoup.convert(model)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (PRESETS["w8a8"].weights, None),
        (PRESETS["w8a8-ort"].weights, PRESETS["w8a8-ort"].inputs),
        (PRESETS["w4a16"].weights, SCHEME.inputs),
        (PRESETS["fp8-static"].weights, PRESETS["fp8-static"].inputs),
    ],
    ids=["float inputs", "dynamic inputs", "groups", "floats"],
)
def test_a_scheme_whose_products_have_no_one_step_is_refused(weights: object, inputs: object) -> None:
    with pytest.raises(ValueError, match="scheme 'mine': integer_bias asked, and there is no one step"):
        Scheme(name="mine", weights=weights, inputs=inputs, integer_bias=True)
