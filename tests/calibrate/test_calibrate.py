"""Calibration: ranges from data, and no other trace of it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import calibrate, prepare, resolve
from recoup.calibrate import OBSERVERS, MinMax
from recoup.nn import FakeQuantizer, QuantModule
from recoup.numerics import choose_global_scale, choose_qparams, fake_quantize
from recoup.numerics.granularity import cut
from recoup.schemes import PRESETS, Scheme
from tests.models import (
    MLP,
    MODELS,
    PAIRS,
    SCHEMES,
    WIDTH,
    Row,
    built,
    every_model,
    every_scheme,
    features,
    name_of,
    recipe,
    run,
    same,
)

every_observer = pytest.mark.parametrize("observer", OBSERVERS)


def prepared(scheme: Scheme | str, build: Callable[[], nn.Module] = MLP, **fields: Any) -> nn.Module:
    model = build()
    return prepare(model, resolve(model, recipe(scheme, **fields)))


def quantizers(model: nn.Module) -> list[FakeQuantizer]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizer)]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("row", "scheme", "observer"),
    [
        *((*pair, "minmax") for pair in PAIRS),
        *(
            (MODELS[0], scheme, observer)
            for scheme in SCHEMES
            for observer in OBSERVERS
            if observer != "minmax"
        ),
        *((row, PRESETS["w8a8-static"], observer) for row in MODELS[1:] for observer in OBSERVERS),
    ],
    ids=name_of,
)
def test_everything_runs_afterwards_and_nothing_else_has_changed(
    row: Row, scheme: Scheme, observer: str
) -> None:
    model = row.build().train()
    next(model.children()).training = False
    prepare(model, resolve(model, scheme))
    weights = {name: value.clone() for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    assert calibrate(model, [row.batch()], observer=observer) is model
    assert all(quantizer.calibrated and quantizer.enabled for quantizer in quantizers(model))
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(value.isfinite().all() for value in run(model.eval(), row.batch()))


def squared_error(module: QuantModule) -> float:
    weight = module.weight.detach()
    return float((module.weight_quantizer(weight).detach() - weight).double().square().sum())


@every_scheme
def test_mse_is_never_worse_than_minmax_on_a_weight(scheme: Scheme) -> None:
    errors = []
    for observer in ("minmax", "mse"):
        torch.default_generator.manual_seed(0)
        model = prepared(scheme)
        model.up.weight.data[0, 0] = 3.0  # an outlier, to be clipped where groups are long
        calibrate(model, [features()], observer=observer)
        errors.append([squared_error(module) for module in (model.up, model.down)])
    assert all(mse <= minmax for minmax, mse in zip(*errors, strict=True))


@pytest.mark.parametrize("name", ["w4a16", "w2a16", "nvfp4"])
def test_mse_is_better_where_rounding_and_clipping_can_be_traded(name: str) -> None:
    errors = []
    for observer in ("minmax", "mse"):
        torch.default_generator.manual_seed(0)
        model = calibrate(prepared(name), [features()], observer=observer)
        errors.append(squared_error(model.down))
    assert errors[1] < errors[0]


@every_scheme
def test_minmax_of_a_weight_is_what_prepare_chose_already(scheme: Scheme) -> None:
    model = prepared(scheme)
    before = {name: value.clone() for name, value in model.state_dict().items() if "weight_quantizer" in name}
    calibrate(model, [features()])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES if not scheme.weights.needs_values], ids=name_of
)
def test_mse_is_never_worse_than_minmax_on_a_block(scheme: Scheme) -> None:
    spec, x = scheme.weights, torch.randn(WIDTH, WIDTH)
    x[0] *= 30
    errors = []
    for observer in ("minmax", "mse"):
        watching = OBSERVERS[observer](spec)
        watching.observe(x)
        lo, hi, amax = watching.range()
        qparams = choose_qparams(lo, hi, spec, choose_global_scale(amax, spec))
        errors.append(cut((fake_quantize(x, qparams, spec) - x).square(), spec.granularity).sum(dim=(1, 3)))
    assert (errors[1] <= errors[0]).all()


BATCHES = [torch.linspace(-2.0, 5.0, 3 * WIDTH).reshape(3, WIDTH), torch.full((2, WIDTH), -6.25)]


def test_static_ranges_by_hand() -> None:
    model = calibrate(prepared("w8a8-static"), BATCHES)
    assert model.up.input_quantizer.scale.tolist() == [[float(torch.tensor(6.25) / 127)]]
    model = calibrate(prepared("w8a8-ort-static"), BATCHES)
    scale = torch.tensor(5.0 - -6.25) / 255
    assert model.up.input_quantizer.scale.tolist() == [[float(scale)]]
    assert model.up.input_quantizer.zero_point.tolist() == [[round(6.25 / float(scale))]]
    model = calibrate(prepared("fp8-static"), BATCHES)
    assert model.up.input_quantizer.scale.tolist() == [[float(torch.tensor(6.25) / 448)]]


def test_the_range_of_a_later_layer_is_that_of_the_float_model() -> None:
    model = MLP()
    with torch.no_grad():
        hidden = torch.relu(model.norm(model.up(torch.cat(BATCHES))))
    prepare(model, resolve(model, "w8a8-ort-static"))
    calibrate(model, BATCHES)
    # Batches of another size may add up in another order, so the range is that of the same batches.
    with torch.no_grad():
        largest = max(
            float(torch.relu(model.norm(nn.functional.linear(x, model.up.weight, model.up.bias))).max())
            for x in BATCHES
        )
    assert largest == pytest.approx(float(hidden.max()))
    assert model.down.input_quantizer.scale.tolist() == [[float(torch.tensor(largest) / 255)]]


def test_the_global_scale_of_dynamic_inputs_is_that_of_the_largest_value_seen() -> None:
    model = calibrate(prepared("nvfp4"), BATCHES)
    quantizer = model.up.input_quantizer
    assert float(quantizer.global_scale) == float(torch.tensor(6.25) / (6 * 448))
    assert quantizer.scale is None


def test_mse_of_an_input_clips_an_outlier() -> None:
    x = torch.randn(64, WIDTH)
    x[0, 0] = 12.0
    spec = PRESETS["w8a8-static"].inputs
    model = calibrate(prepared("w8a8-static"), [x], observer="mse")
    found = model.up.input_quantizer
    wide = choose_qparams(x.amin().reshape(1, 1), x.amax().reshape(1, 1), spec)
    errors = [float((y - x).square().sum()) for y in (found(x), fake_quantize(x, wide, spec))]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("observer", sorted(set(OBSERVERS) - {"moving-average"}))
def test_batches_are_one_after_another_what_they_are_together(observer: str) -> None:
    pieces, whole = prepared("w8a8-static"), prepared("w8a8-static")
    whole.load_state_dict(pieces.state_dict())
    x = torch.cat(BATCHES)
    calibrate(pieces, BATCHES, observer=observer)
    calibrate(whole, [x], observer=observer)
    assert torch.equal(pieces.up.input_quantizer.scale, whole.up.input_quantizer.scale)


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_an_observer_that_saw_nothing(observer: Any) -> None:
    with pytest.raises(ValueError, match="saw no values: no batch reaches it"):
        observer(PRESETS["w8a8-static"].inputs).range()


def test_minmax_starts_from_the_data_not_from_zero() -> None:
    watching = MinMax(PRESETS["w8a8-static"].inputs)
    watching.observe(torch.tensor([[2.0, 3.0]]))
    assert [float(bound) for bound in watching.range()] == [2.0, 3.0, 3.0]


class Renamed(nn.Module):
    """Takes its input by name or by position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(x * scale)


def lazily(batch: Any) -> Iterator[Any]:
    yield batch


@pytest.mark.parametrize("wrap", [lambda batch: [batch], lambda batch: (batch,), lazily])
def test_batches_of_every_kind(wrap: Callable[[Any], Any]) -> None:
    x = BATCHES[0]
    scales = []
    for batch in (x, (x,), [x, 1.0], {"x": x}, {"scale": 1.0, "x": x}):
        model = calibrate(prepared("w8a8-static", Renamed), wrap(batch))
        assert model.recoup_example is batch
        scales.append(float(model.inner.up.input_quantizer.scale))
    assert scales == [float(torch.tensor(5.0) / 127)] * 5


def test_labels_are_no_part_of_the_example() -> None:
    """They would become an input of the exported file."""

    class Labelled(Renamed):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x)

    x = BATCHES[0]
    model = calibrate(prepared("w8a8-static", Labelled), [{"x": x, "labels": torch.zeros(len(x))}])
    assert list(model.recoup_example) == ["x"]


def counted(drawn: list[int], size: int = 4) -> Iterator[Tensor]:
    while True:
        drawn.append(size)
        yield features(size)


@pytest.mark.parametrize(("asked", "seen"), [(None, 512), (10, 12), (4, 4), (1, 4)])
def test_it_draws_no_more_batches_than_it_needs(asked: int | None, seen: int) -> None:
    drawn: list[int] = []
    calibrate(prepared("w8a8-static"), counted(drawn), samples=asked)
    assert sum(drawn) == seen


def test_by_default_fewer_samples_will_do() -> None:
    calibrate(prepared("w8a8-static"), [features(3)])


class Forked(nn.Module):
    """With a branch that no batch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.taken(x)


def with_one(value: float) -> Tensor:
    x = features()
    x[1, 5] = value
    return x


MISTAKES = {
    "too few": (
        "w8a8",
        {"batches": [features(3)] * 3, "samples": 512},
        "calibration: 512 samples asked, 9 found; bring more, or ask for fewer",
    ),
    "no batches": ("w8a8", {"batches": []}, "calibration: 1 samples asked, 0 found; bring more"),
    "an empty generator": ("w4a16", {"batches": iter(())}, "calibration: 1 samples asked, 0 found"),
    "observer": (
        "w8a8",
        {"batches": [features()], "observer": "max"},
        "no observer 'max'; there are minmax, moving-average, percentile, kl, mse",
    ),
    "not a batch": (
        "w8a8",
        {"batches": {"x": features()}},
        "a batch is a tensor, or a mapping or tuple with one",
    ),
    **{
        f"{value}, for {observer}": (
            "w8a8-static",
            {"batches": [features(), with_one(value)], "observer": observer},
            "up.input: saw values that are not finite",
        )
        for value in (torch.nan, torch.inf, -torch.inf)
        for observer in OBSERVERS
    },
    "infinity": (
        "nvfp4",
        {"batches": [torch.full((1, WIDTH), torch.inf)]},
        "up.input: saw values that are not",
    ),
}


@pytest.mark.parametrize(("name", "given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(name: str, given: dict[str, Any], message: str) -> None:
    model = prepared(name)
    with pytest.raises(ValueError, match=r"\w") as error:
        calibrate(model, **given)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert hooks(model) == 0
    assert all(quantizer.enabled for quantizer in quantizers(model))


def test_a_float_model() -> None:
    with pytest.raises(
        ValueError, match=r"nothing to calibrate: the model is not prepared; run recoup\.prepare first"
    ):
        calibrate(MLP(), [features()])


@pytest.mark.parametrize("name", ["w8a8-static", "nvfp4"])
@every_observer
def test_a_layer_that_no_batch_reaches_is_named(name: str, observer: str) -> None:
    with pytest.raises(ValueError, match=r"^other\.input: saw no values: no batch reaches it$"):
        calibrate(prepared(name, Forked), [features()], observer=observer)


def test_dynamic_ranges_need_no_run() -> None:
    model = prepared("w8a8", Forked)
    model.forward = None  # would raise
    calibrate(model, [features()])


def test_a_batch_that_raises_leaves_quantization_on_and_no_hooks() -> None:
    model = prepared("w8a8-static").train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(model, [features(), torch.zeros(2, 3)])
    assert all(quantizer.enabled for quantizer in quantizers(model))
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())


class Noisy(nn.Module):
    """With the two modules that behave differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)))


def test_running_statistics_and_dropout_play_no_part() -> None:
    model = prepared("w8a8-static", Noisy).train()
    calibrate(model, BATCHES)
    assert int(model.norm.num_batches_tracked) == 0
    with torch.no_grad():
        largest = model.eval().norm(torch.cat(BATCHES)).abs().max()
    assert torch.equal(model.out.input_quantizer.scale, (largest / 127).reshape(1, 1))


def test_calibrated_again_it_forgets_the_first_time() -> None:
    model = prepared("w8a8-static")
    calibrate(model, [1000 * features()])
    calibrate(model, BATCHES)
    assert float(model.up.input_quantizer.scale) == float(torch.tensor(6.25) / 127)


@every_model
def test_calibration_is_deterministic(row: Row) -> None:
    model, batch = built(row), row.batch()
    prepare(model, resolve(model, "w8a8-static"))
    first = run(calibrate(model, [batch], observer="mse"), batch)
    assert same(run(calibrate(model, [batch], observer="mse"), batch), first)


def test_the_table_has_static_inputs_and_global_scales() -> None:
    inputs = [scheme.inputs for scheme in SCHEMES if scheme.inputs]
    assert any(spec.ranges == "static" for spec in inputs)
    assert any(spec.global_scale for spec in inputs)
