"""The prepared modules: each forward is the equation, and its gradient reaches the float weight."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recoup
from recoup.nn import (
    QUANT_MODULES,
    Codes,
    FakeQuantizer,
    NonFiniteError,
    QuantEmbedding,
    QuantLinear,
    call,
    is_prepared,
    quant_type,
    quantization_off,
    seen_bias,
    size_of,
)
from recoup.numerics import dequantize, extrema, qparams_of, quantize
from recoup.schemes import PRESETS, Scheme
from tests.models import SCHEMES, WIDTH, WORDS, every_scheme


def linear(scheme: Scheme, bias: bool = True) -> QuantLinear:
    return QuantLinear.from_float(nn.Linear(WIDTH, WIDTH, bias=bias), scheme, "layer")


def seen(module: QuantLinear, x: Tensor) -> QuantLinear:
    """Calibrated on x, by the definitions."""
    quantizer = module.input_quantizer
    if isinstance(quantizer, FakeQuantizer) and quantizer.needs_calibration:
        view = x.reshape(-1, x.shape[-1])
        if quantizer.spec.ranges == "dynamic":
            quantizer.set_range(*extrema(view, replace_rows(quantizer)))
        else:
            quantizer.set_range(*extrema(view, quantizer.spec.granularity))
    return module


def replace_rows(quantizer: FakeQuantizer) -> object:
    return replace(quantizer.spec.granularity, rows=None, columns=None)


def on_lattice(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """x, through codes: the definition of what a fake quantizer does."""
    view, spec = x.detach().reshape(-1, x.shape[-1]), quantizer.spec
    qparams = (
        qparams_of(view, spec, quantizer.global_scale)
        if spec.ranges == "dynamic"
        else quantizer.stored_qparams
    )
    return dequantize(quantize(view, qparams, spec), qparams, spec).reshape(x.shape).to(x.dtype)


@every_scheme
@pytest.mark.parametrize(
    ("shape", "bias"), [((WIDTH,), True), ((3, WIDTH), False), ((2, 3, WIDTH), True)], ids=str
)
def test_linear_is_the_equation(scheme: Scheme, shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(shape)
    module = seen(linear(scheme, bias), x)
    inputs = x if scheme.inputs is None else on_lattice(module.input_quantizer, x)
    expected = F.linear(inputs, on_lattice(module.weight_quantizer, module.weight), seen_bias(module))
    assert torch.equal(module(x), expected)
    assert not torch.equal(module(x), F.linear(x, module.weight, module.bias))


@every_scheme
def test_embedding_is_the_equation(scheme: Scheme) -> None:
    scheme = Scheme(name=scheme.name, weights=scheme.weights)
    module = QuantEmbedding.from_float(nn.Embedding(WIDTH, WIDTH), scheme, "words")
    ids = torch.randint(0, WIDTH, (2, 3))
    assert torch.equal(module(ids), on_lattice(module.weight_quantizer, module.weight)[ids])
    assert not torch.equal(module(ids), module.weight[ids])


@every_scheme
@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_gradients_reach_the_weight_the_bias_the_input_and_only_learned_scales(
    scheme: Scheme, ranges: str
) -> None:
    module = linear(replace(scheme, weights=replace(scheme.weights, ranges=ranges)))
    x = torch.randn(3, WIDTH, requires_grad=True)
    seen(module, x.detach())(x).square().sum().backward()
    leaves = {"x": x, **dict(module.named_parameters())}
    scales = {f"weight_quantizer.{name}" for name, _ in module.weight_quantizer.named_parameters()}
    assert ("weight_quantizer.scale" in scales) == (ranges == "learned")
    assert ("weight_quantizer.offset" in scales) == (ranges == "learned" and not scheme.weights.symmetric)
    assert set(leaves) == {"x", "weight", "bias"} | scales
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad.count_nonzero() > 0


@every_scheme
def test_switched_off_it_is_the_float_module_bit_for_bit(scheme: Scheme) -> None:
    float_module = nn.Linear(WIDTH, WIDTH)
    module = QuantLinear.from_float(float_module, scheme, "layer")
    x = torch.randn(3, WIDTH)
    with quantization_off(module):  # not calibrated, and none is needed
        assert torch.equal(module(x), float_module(x))


@every_scheme
def test_an_input_without_a_range_says_which(scheme: Scheme) -> None:
    module = linear(scheme)
    inputs = scheme.inputs
    if inputs is None or not (inputs.ranges == "static" or inputs.global_scale):
        assert module(torch.randn(3, WIDTH)).isfinite().all()
        return
    message = r"^layer\.input: its range is not known; run recoup\.calibrate\(model, batches\) first$"
    with pytest.raises(RuntimeError, match=message):
        module(torch.randn(3, WIDTH))


@every_scheme
def test_every_tensor_of_state_has_its_final_shape_from_the_start(scheme: Scheme) -> None:
    module = linear(scheme)
    before = {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}
    seen(module, torch.randn(3, WIDTH))
    assert {name: (value.shape, value.dtype) for name, value in module.state_dict().items()} == before


@every_scheme
def test_it_is_where_the_float_module_is(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    # No second device is at hand everywhere; "meta" has no values, so none are looked at.
    monkeypatch.setattr(FakeQuantizer, "fit", lambda *_: None)
    module = QuantLinear.from_float(nn.Linear(WIDTH, WIDTH, device="meta"), scheme, "layer")
    assert {state.device.type for state in module.state_dict().values()} == {"meta"}


def test_the_float_module_is_left_as_it_was() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    before = {name: dict(v) if isinstance(v, dict) else v for name, v in vars(module).items()}
    twin = QuantLinear.from_float(module, PRESETS["w8a8"], "layer")
    assert vars(module) == before
    assert twin.weight is module.weight
    assert twin.bias is module.bias


W4A16 = PRESETS["w4a16"]


def test_padding_has_no_gradient_and_its_row_is_quantized_like_any() -> None:
    float_module = nn.Embedding(WORDS, WIDTH, padding_idx=2)
    float_module.weight.data[2] = 1.3  # libraries load checkpoints in which it is not zero
    module = QuantEmbedding.from_float(float_module, W4A16, "words")
    ids = torch.tensor([2, 5, 5])
    y = module(ids)
    assert torch.equal(y[0], on_lattice(module.weight_quantizer, module.weight)[2])
    y.sum().backward()
    assert module.weight.grad[2].count_nonzero() == 0
    assert module.weight.grad[5].count_nonzero() > 0


def test_gradients_are_scaled_by_frequency_where_the_float_module_did() -> None:
    ids = torch.tensor([1, 1, 1, 3])
    scheme = replace(W4A16, weights=replace(W4A16.weights, gradient="pass-through"))
    float_module = nn.Embedding(WORDS, WIDTH, scale_grad_by_freq=True)
    float_module(ids).sum().backward()
    expected, float_module.weight.grad = float_module.weight.grad, None
    module = QuantEmbedding.from_float(float_module, scheme, "words")
    module(ids).sum().backward()
    assert torch.equal(module.weight.grad, expected)


def refuses(message: str, **fields: object) -> None:
    with pytest.raises(ValueError, match=message):
        QuantEmbedding.from_float(nn.Embedding(WORDS, WIDTH, **fields), W4A16, "words")


def test_embeddings_that_change_their_weight_or_have_sparse_gradients_are_refused() -> None:
    refuses(
        r"^words: an embedding with max_norm rescales its weight as it runs; keep it in float", max_norm=1.0
    )
    refuses(r"^words: an embedding with sparse gradients asked; build it with sparse=False", sparse=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_range_must_be_finite(value: float) -> None:
    module = linear(PRESETS["w8a8-static"])
    before = module.input_quantizer.state_dict()
    with pytest.raises(
        ValueError, match=r"^layer\.input: saw values that are not finite; check the model and"
    ):
        module.input_quantizer.set_range(torch.tensor([[value]]), torch.tensor([[value]]))
    assert not module.input_quantizer.calibrated
    assert all(state.isnan().all() for state in before.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_scheme
def test_what_is_not_finite_is_an_error_that_names_the_tensor(scheme: Scheme, value: float) -> None:
    x = torch.randn(3, WIDTH)
    module = seen(linear(scheme), x)
    message = "holds NaN or infinity, which has no code; look for where it comes from before this"
    if scheme.inputs is not None:
        bad = x.clone()
        bad[1, 2] = value
        with pytest.raises(NonFiniteError, match=rf"^layer\.input: {message}$"):
            module(bad)
    module.weight.data[1, 2] = value
    with pytest.raises(NonFiniteError, match=rf"^layer\.weight: {message}$") as error:
        module(x)
    assert error.value.tensor == "layer.weight"
    with quantization_off(module):
        module(x)


@every_scheme
def test_learned_state_comes_back(scheme: Scheme) -> None:
    learned = replace(scheme, weights=replace(scheme.weights, ranges="learned"))
    module, other = linear(learned), linear(learned)
    with torch.no_grad():
        for parameter in module.weight_quantizer.parameters():
            parameter.mul_(1.1)
    other.load_state_dict(module.state_dict(), strict=True)
    x = seen_twice(module, other)
    assert torch.equal(other(x), module(x))
    names = {name for name, _ in module.weight_quantizer.named_parameters()}
    assert names == {"scale"} | ({"offset"} if not scheme.weights.symmetric else set())
    codes = Codes.of(module)
    assert torch.equal(codes.decode(), module.weight_quantizer(module.weight))
    if codes.zero_point is not None:
        assert codes.zero_point.dtype == torch.int32


def seen_twice(*modules: QuantLinear) -> torch.Tensor:
    x = torch.randn(3, WIDTH)
    for module in modules:
        seen(module, x)
    return x


def test_a_rule_that_needs_values_takes_no_range() -> None:
    module = linear(PRESETS["nvfp4-4over6"])
    lo, hi = extrema(module.weight, module.weight_quantizer.spec.granularity)
    with pytest.raises(
        ValueError,
        match=r"^layer\.weight: four-over-six chooses scales by a block's values, and here are only",
    ):
        module.weight_quantizer.set_range(lo, hi)
    before = module.weight_quantizer.scale.clone()
    module.weight_quantizer.fit(module.weight)
    assert torch.equal(module.weight_quantizer.scale, before)


def test_the_table_names_types_and_every_twin_knows_how_to_be_one() -> None:
    for name, twin in QUANT_MODULES.items():
        assert issubclass(twin, nn.Module)
        assert {"from_float", "inputs_are"} <= set(dir(twin))
        assert {"matrix"} <= set(dir(twin)) or {"names", "view", "check"} <= set(dir(twin))
        package, _, attribute = name.rpartition(".")
        assert package
        assert attribute
    assert quant_type(nn.Linear(2, 2)) is QuantLinear
    assert quant_type(nn.Embedding(2, 2)) is QuantEmbedding
    assert quant_type(nn.ReLU()) is None
    assert is_prepared(linear(W4A16))


def test_a_name_from_a_package_that_is_not_imported_matches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANT_MODULES, "no_such_package.Linear", QuantLinear)
    assert quant_type(nn.ReLU()) is None


def test_quantization_off_leaves_off_what_was_off_and_comes_back_after_an_error() -> None:
    module = linear(PRESETS["w8a8"])
    module.input_quantizer.enabled = False
    with quantization_off(module):
        assert not module.weight_quantizer.enabled
    assert module.weight_quantizer.enabled
    with pytest.raises(ValueError, match="a batch is"), quantization_off(module):
        size_of(())
    assert module.weight_quantizer.enabled
    assert not module.input_quantizer.enabled


def test_a_module_prints_its_lattice() -> None:
    assert "int4 per g32, static" in str(linear(W4A16))


X = torch.zeros(5, 2)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X], {"x": X}, {"flag": True, "x": X}, (None, X)],
    ids=lambda batch: type(batch).__name__,
)
def test_the_size_of_a_batch(batch: object) -> None:
    assert size_of(batch) == 5


@pytest.mark.parametrize("batch", [{}, (), {"x": 1}, "input_ids"], ids=str)
def test_a_batch_without_a_tensor(batch: object) -> None:
    with pytest.raises(ValueError, match="a batch is a tensor, or a mapping or tuple with one in it; found "):
        size_of(batch)


def test_how_a_batch_goes_in() -> None:
    def model(*args: object, **kwargs: object) -> object:
        return args, kwargs

    assert call(model, X) == ((X,), {})
    assert call(model, (X, 1)) == call(model, [X, 1]) == ((X, 1), {})
    assert call(model, {"x": X}) == ((), {"x": X})


def test_the_table_has_dynamic_static_and_absent_inputs() -> None:
    assert {scheme.inputs and scheme.inputs.ranges for scheme in SCHEMES} == {None, "dynamic", "static"}


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8-ort", "fp8", "mxfp4"])
def test_no_tokens_at_all_pass_through(scheme):
    """An expert that no token was routed to sees an empty batch."""
    model = nn.Sequential(nn.Linear(32, 4))
    recoup.ptq(model, scheme, [torch.randn(4, 32)])
    assert model(torch.zeros(0, 32)).shape == (0, 4)
