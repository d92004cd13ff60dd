"""The door out: codes and scales, decided once; not a bit of what the model computes changes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from recoup import calibrate, convert, prepare, resolve
from recoup.nn import CodedEmbedding, CodedLinear, FakeQuantizer, is_coded, is_prepared, quantization_off
from recoup.numerics import dequantize
from recoup.schemes import PRESETS, Scheme
from tests.models import (
    MLP,
    WIDTH,
    WORDS,
    Row,
    Tied,
    every_pair,
    every_scheme,
    features,
    ids,
    recipe,
    run,
    same,
)


def prepared(row: Row, scheme: Scheme | str, **fields: object) -> nn.Module:
    model = row.build().eval()
    prepare(model, resolve(model, recipe(scheme, **fields)))
    return calibrate(model, [row.batch()])


@every_pair
def test_converted_it_computes_the_same_bits(row: Row, scheme: Scheme) -> None:
    model, batch = prepared(row, scheme), row.batch()
    expected = run(model, batch)
    shapes = {
        name: module.matrix(module).shape for name, module in model.named_modules() if is_prepared(module)
    }
    assert convert(model) is model
    assert same(run(model, batch), expected)
    coded = {name for name, module in model.named_modules() if is_coded(module)}
    assert coded == row.quantized
    no_float_weight_is_left(model, shapes, scheme)


def no_float_weight_is_left(model: nn.Module, shapes: dict[str, torch.Size], scheme: Scheme) -> None:
    state = model.state_dict()
    for name, shape in shapes.items():
        assert f"{name}.weight" not in state
        codes, scale = state[f"{name}.weight.codes"], state[f"{name}.weight.scale"]
        assert codes.dtype == scheme.weights.format.code_dtype
        assert codes.shape == shape
        assert scale.shape == scheme.weights.granularity.scale_shape(*shape)
        affine, nested = scheme.weights.scale_rule == "affine", scheme.weights.global_scale
        assert (f"{name}.weight.zero_point" in state) == affine
        assert (f"{name}.weight.global_scale" in state) == nested
    left = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(".weight")}
    assert not left & set(shapes)


@every_scheme
@pytest.mark.parametrize("ranges", ["dynamic", "learned"])
def test_with_other_weight_ranges_too(scheme: Scheme, ranges: str) -> None:
    model = MLP()
    prepare(model, resolve(model, recipe(scheme, weight_ranges=ranges)))
    calibrate(model, [features()], observer="mse")
    for name, parameter in model.named_parameters():
        if name.endswith("quantizer.scale"):
            parameter.data *= 0.9  # as training would, off the grid of stored scales
    expected = run(model, x := features())
    assert same(run(convert(model), x), expected)
    assert not [name for name, _ in model.named_parameters() if "quantizer" in name]


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_model_too(scheme: Scheme, dtype: torch.dtype) -> None:
    model = MLP().to(dtype)
    prepare(model, resolve(model, scheme))
    calibrate(model, [features().to(dtype)])
    x = features().to(dtype)
    expected = run(model, x)
    assert same(run(convert(model), x), expected)
    assert model.up.weight.decode().dtype == dtype


@every_scheme
def test_embeddings_too(scheme: Scheme) -> None:
    if scheme.inputs is not None:
        scheme = Scheme(name=scheme.name, weights=scheme.weights)
    if scheme.weights.granularity.rows not in (None, 1):
        scheme = Scheme(name=scheme.name, weights=PRESETS["w4a16"].weights)  # 4 rows are no tile of 128
    model = Tied()
    prepare(model, resolve(model, recipe(scheme, ("positions", scheme))))
    expected = run(model, batch := ids())
    assert same(run(convert(model), batch), expected)
    assert isinstance(model.positions, CodedEmbedding)
    assert (model.positions.num_embeddings, model.positions.embedding_dim) == (4, WIDTH)
    assert model.lm_head.weight is model.tokens.weight
    assert model.tokens.weight.shape == (WORDS, WIDTH)


@every_scheme
def test_the_codes_are_what_was_trained(scheme: Scheme) -> None:
    model = MLP()
    prepare(model, resolve(model, scheme))
    calibrate(model, [features()])
    quantizer, weight = model.up.weight_quantizer, model.up.weight
    expected = quantizer(weight).detach()
    convert(model)
    codes = model.up.weight
    assert torch.equal(codes.scale, quantizer.scale)
    assert torch.equal(codes.decode(), expected)
    assert torch.equal(dequantize(codes.codes, codes.qparams, scheme.weights), expected)
    assert codes.spec == scheme.weights
    assert model.up.scheme == scheme


@every_scheme
def test_converted_state_moves_but_is_never_rounded_by_a_cast(scheme: Scheme) -> None:
    model = MLP()
    prepare(model, resolve(model, scheme))
    convert(calibrate(model, [features()]))
    before = {name: value.clone() for name, value in model.up.weight.state_dict().items()}
    model.to(torch.bfloat16)
    after = model.up.weight.state_dict()
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_not_quantized_is_the_same_object() -> None:
    model = MLP()
    prepare(model, resolve(model, "w8a8-static"))
    calibrate(model, [features()])
    norm, head, bias, inputs = model.norm, model.head, model.up.bias, model.up.input_quantizer
    convert(model)
    assert (model.norm, model.head, model.up.bias, model.up.input_quantizer) == (norm, head, bias, inputs)
    assert model.down.bias is None
    assert isinstance(model.up, CodedLinear)


def test_forward_hooks_and_flags_go_along() -> None:
    model = MLP()
    model.down.eval()
    prepare(model, resolve(model, "w4a16"))
    handle = model.up.register_forward_hook(lambda module, args, y: 2 * y)
    x = features()
    doubled = run(model, x)
    convert(model)
    assert [model.up.training, model.down.training] == [True, False]
    assert same(run(model, x), doubled)
    handle.remove()
    assert not same(run(model, x), doubled)


def switched_off(model: nn.Module) -> None:
    model.down.weight_quantizer.enabled = False


def input_switched_off(model: nn.Module) -> None:
    model.up.input_quantizer.enabled = False


REFUSED: dict[str, tuple[str, Callable[[nn.Module], object], str]] = {
    "a weight in float": ("w8a8", switched_off, "down.weight: its quantizer is switched off, so this is not"),
    "an input in float": (
        "w8a8",
        input_switched_off,
        "up.input: its quantizer is switched off, so this is not",
    ),
    "static inputs": (
        "w8a8-static",
        lambda model: None,
        "up.input: its range is not known; run recoup.calibrate(model, batches) first",
    ),
    "a global scale": ("nvfp4", lambda model: None, "up.input: its range is not known; run recoup.calibrate"),
    "twice": ("w4a16", convert, "nothing to convert: the model has no prepared modules; run recoup.prepare"),
}


@pytest.mark.parametrize(("name", "damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_was_not_measured_is_not_converted(
    name: str, damage: Callable[[nn.Module], object], message: str
) -> None:
    model = MLP()
    prepare(model, resolve(model, name))
    damage(model)
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"\.|nothing") as error:
        convert(model)
    assert str(error.value).startswith(message)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_inside_quantization_off_nothing_is_converted() -> None:
    model = MLP()
    prepare(model, resolve(model, "w4a16"))
    with (
        quantization_off(model),
        pytest.raises(ValueError, match=r"up\.weight: its quantizer is switched off"),
    ):
        convert(model)
    convert(model)
    assert not any(isinstance(module, FakeQuantizer) for module in model.modules())


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to convert: the model has no prepared modules"):
        convert(MLP())


def test_a_weight_that_training_broke_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    prepare(model, resolve(model, "w4a16"))
    model[0].weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^0\.weight: holds values that are not finite"):
        convert(model)
    assert model[0].weight[0, 0].isfinite()


class Naming(nn.Module):
    """Names the argument, as torch's modules let a caller do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up = nn.Embedding(8, 32), nn.Linear(32, 32)
        self.conv = nn.Conv1d(32, 32, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(input=self.up(input=self.tokens(input=ids)).mT)


def test_arguments_have_the_names_that_they_had_in_float() -> None:
    model, ids = Naming(), torch.randint(0, 8, (2, 8))
    prepare(model, resolve(model, recipe("w8a8-static", ("tokens", "w8a16"))))
    calibrate(model, [ids])
    before = model(ids)
    assert torch.equal(convert(model)(ids), before)


def test_a_cast_changes_what_codes_are_decoded_to_and_no_code() -> None:
    model, ids = Naming(), torch.randint(0, 8, (2, 8))
    prepare(model, resolve(model, recipe("w8a8-static", ("tokens", "w8a16"))))
    calibrate(model, [ids])
    codes = convert(model).up.weight.codes.clone()
    assert model.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert torch.equal(model.up.weight.codes, codes)
    assert model.up.weight.scale.dtype == torch.float32
