"""Observers against definitions written another way: NumPy, torch.ao, and loops."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from recoup.calibrate import KL, MSE, OBSERVERS, MinMax, MovingAverage, Percentile
from recoup.numerics import (
    E4M3,
    IntFormat,
    QuantSpec,
    choose_qparams,
    fake_quantize,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)
from recoup.schemes import PRESETS
from tests.models import WIDTH

INT8 = QuantSpec(format=IntFormat(8), granularity=per_tensor, scale_rule="narrow", ranges="static")
UINT8 = QuantSpec(
    format=IntFormat(8, signed=False), granularity=per_tensor, scale_rule="affine", ranges="static"
)
INT4 = replace(INT8, format=IntFormat(4))
FP8 = replace(INT8, format=E4M3)
SPECS = {"int8": INT8, "uint8 with a zero point": UINT8, "int4": INT4, "fp8": FP8}


def laplace(rows: int = 512) -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((rows, WIDTH))


def outlier() -> Tensor:
    x = torch.randn(512, WIDTH)
    x[3, 5] = 40.0
    return x


SHAPES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(512, WIDTH),
    "heavy tails": laplace,
    "after a ReLU": lambda: torch.randn(512, WIDTH).relu(),
    "one outlier": outlier,
    "shifted": lambda: torch.randn(512, WIDTH) + 3,
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def bounds(observer: Callable[[QuantSpec], MinMax], spec: QuantSpec, *views: Tensor) -> list[float]:
    watching = observer(spec)
    for view in views:
        watching.observe(view)
    lo, hi, _ = watching.range()
    return [float(lo), float(hi)]


def test_a_moving_average_is_torchs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch.ao moves to torchao; it is the oracle here
        from torch.ao.quantization import MovingAverageMinMaxObserver

        oracle = MovingAverageMinMaxObserver(averaging_constant=0.1)
    views = [scale * torch.randn(8, WIDTH) for scale in (1.0, 5.0, 0.1, 2.0)]
    for view in views:
        oracle(view)
    assert bounds(MovingAverage, INT8, *views) == pytest.approx(
        [float(oracle.min_val), float(oracle.max_val)]
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_moving_average_of_a_weight_is_its_extrema(name: str) -> None:
    weight = torch.randn(WIDTH, WIDTH)
    results = []
    for observer in (MinMax, MovingAverage):
        watching = observer(PRESETS[name].weights)
        watching.observe(weight)
        results.append(watching.range())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_shape
@pytest.mark.parametrize("rows", [1, 3, 79, 512])  # of 128 values: below and above ten thousand
def test_a_percentile_is_numpys(shape: Callable[[], Tensor], rows: int) -> None:
    x = shape()[:rows]
    threshold = np.quantile(np.abs(x.numpy().astype(np.float64)), 0.9999)
    expected = [max(float(x.min()), -threshold), min(float(x.max()), threshold)]
    assert bounds(Percentile, INT8, x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("granularity", [per_channel, per_group(16), per_block(32, 64)], ids=str)
def test_each_block_has_a_percentile_of_its_own(granularity: object) -> None:
    x = torch.randn(WIDTH, WIDTH) * torch.rand(WIDTH, 1)
    watching = Percentile(replace(INT8, granularity=granularity))
    watching.observe(x)
    lo, hi, amax = watching.range()
    rows, columns = granularity.rows, granularity.columns or WIDTH
    for (i, j), most in np.ndenumerate(hi.numpy()):
        block = x.numpy()[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].astype(np.float64)
        threshold = np.quantile(np.abs(block), 0.9999)
        assert most == pytest.approx(min(block.max(), threshold), rel=1e-6)
        assert lo[i, j] == pytest.approx(max(block.min(), -threshold), rel=1e-6)
    assert float(amax) == float(x.abs().max())


def divergences(x: np.ndarray, spec: QuantSpec, thresholds: set[int]) -> dict[int, float]:
    """KL(P || Q) of thresholds in bins, bin by bin, as TensorRT's definition reads."""
    amax = np.float32(np.abs(x).max())
    width = amax / np.float32(2048)
    counts, _ = np.histogram(x[x != 0], bins=4096, range=(-amax, amax))
    found = {}
    for bins in thresholds:
        lo = torch.tensor([[max(float(x.min()), -bins * width)]])
        hi = torch.tensor([[min(float(x.max()), bins * width)]])
        inside = range(2048 - bins, 2048 + bins)
        places = torch.tensor([[(i + 0.5 - 2048) * width for i in inside]], dtype=torch.float32)
        values = fake_quantize(places, choose_qparams(lo, hi, spec), spec)[0].tolist()
        p = [float(counts[i]) for i in inside]
        p[0] += counts[: 2048 - bins].sum()
        p[-1] += counts[2048 + bins :].sum()
        levels: dict[float, list[int]] = {}
        for place, value in enumerate(values):
            if p[place] > 0:
                levels.setdefault(value, []).append(place)
        q = [0.0] * len(p)
        for places_of_level in levels.values():
            mass = sum(counts[inside[place]] for place in places_of_level)
            for place in places_of_level:
                q[place] = max(mass / len(places_of_level), 1e-4)
        p, q = np.array(p) / sum(p), np.array(q) / sum(q)
        found[bins] = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    return found


@every_spec
@every_shape
def test_kl_finds_the_threshold_that_a_loop_finds(spec: QuantSpec, shape: Callable[[], Tensor]) -> None:
    x = shape()
    lo, hi = bounds(KL, spec, x)
    width = float(x.abs().max()) / 2048
    clipped = [abs(bound) for bound, seen in ((lo, x.min()), (hi, x.max())) if bound != float(seen)]
    chosen = round(clipped[0] / width) if clipped else 2048
    neighbours = {max(chosen - 8, 2 ** (spec.format.bits - 1)), chosen, min(chosen + 8, 2048)}
    found = divergences(x.numpy(), spec, {*range(2 ** (spec.format.bits - 1), 2049, 128), *neighbours})
    # Thresholds beyond the extrema are all the same range; histograms may disagree on values at an edge.
    assert found[chosen] <= min(found.values()) + 1e-4
    if clipped:
        assert clipped == pytest.approx([chosen * width] * len(clipped), rel=1e-6)


def test_kl_gives_up_an_outlier_that_min_and_max_keep() -> None:
    assert bounds(KL, INT8, outlier())[1] < 6.0 < bounds(MinMax, INT8, outlier())[1]


@pytest.mark.parametrize("granularity", [per_channel, per_group(32), per_block(32, 64)], ids=str)
def test_kl_keeps_the_extrema_of_blocks(granularity: object) -> None:
    spec, x = replace(INT8, granularity=granularity), laplace(WIDTH)
    results = []
    for observer in (KL, MinMax):
        watching = observer(spec)
        watching.observe(x)
        results.append(watching.range())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_spec
@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_a_range_is_within_the_extrema_and_zeros_have_one(
    observer: Callable[[QuantSpec], MinMax], spec: QuantSpec
) -> None:
    x = laplace(8)
    lo, hi = bounds(observer, spec, x)
    assert float(x.min()) <= lo <= 0 <= hi <= float(x.max())
    assert bounds(observer, spec, torch.zeros(2, WIDTH)) == [0.0, 0.0]
    assert bounds(observer, spec, torch.full((2, WIDTH), 3.0))[1] > 0


SAMPLING = {"percentile": Percentile, "kl": KL, "mse": MSE}


@pytest.mark.parametrize("observer", SAMPLING.values(), ids=SAMPLING)
def test_a_large_input_is_judged_on_rows_from_all_of_it(observer: Callable[[QuantSpec], MSE]) -> None:
    watching = observer(INT8)
    for value in (1.0, 2.0, 3.0):
        watching.observe(torch.full((1024, WIDTH), value))
    rows = torch.cat([rows for rows, _ in watching.kept])
    assert 2**16 < rows.numel() <= 2**18
    assert rows.unique().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("period", [96, 3584])
def test_the_sample_is_in_step_with_no_period(period: int) -> None:
    """The rows of an image's 2-D view are channels and heights in turn; every channel must be heard."""
    watching, columns = Percentile(INT8), 256
    for _ in range(2**14 // period):
        watching.observe(torch.arange(period, dtype=torch.float32)[:, None].expand(-1, columns))
    phases = torch.cat([rows[:, 0] for rows, _ in watching.kept])
    assert 2**9 <= len(phases) <= 2**10
    quarters = (phases * 4 / period).long().bincount(minlength=4)
    # binomial: five standard deviations
    assert (quarters - len(phases) / 4).abs().max() < 5 * (len(phases) * 3 / 16) ** 0.5


def test_the_sample_is_the_same_however_rows_come() -> None:
    x, results = torch.randn(2**13, WIDTH), []
    for size in (2**13, 1000, 64):
        watching = Percentile(INT8)
        for part in x.split(size):
            watching.observe(part)
        results.append(torch.cat([rows for rows, _ in watching.kept]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
def test_rows_of_several_lengths_are_one_tensors(observer: Callable[[QuantSpec], MinMax]) -> None:
    """Images of several sizes reach a convolution one after another."""
    wide, narrow = torch.linspace(-1, 1, 64).reshape(2, 32), torch.linspace(-1, 1, 16).reshape(2, 8)
    lo, hi = bounds(observer, INT8, wide, narrow)
    assert -1.0 <= lo < -0.5 < 0.5 < hi <= 1.0


def test_a_few_very_long_rows_are_kept() -> None:
    assert bounds(Percentile, INT8, torch.ones(1, 2**19)) == [1.0, 1.0]


def test_values_that_change_in_place_after_they_were_seen_are_remembered_as_they_were() -> None:
    x = torch.randn(8, WIDTH)
    watching, before = Percentile(INT8), bounds(Percentile, INT8, x)
    watching.observe(x)
    x.zero_()
    assert [float(bound) for bound in watching.range()[:2]] == before
