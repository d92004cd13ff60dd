"""Quantize, dequantize, fake quantize: one lattice, whichever of them computes it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gfloat import RoundMode, round_ndarray
from gfloat.formats import format_info_ocp_e3m2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recoup.numerics import (
    FixedFormat,
    FloatFormat,
    IntFormat,
    LevelFormat,
    QParams,
    QuantSpec,
    StretchedFormat,
    dequantize,
    fake_quantize,
    per_channel,
    per_group,
    qparams_of,
    quantize,
)

from .tables import SPECS, bits, is_odd, numbers_of, over, sample

ROWS, COLUMNS = 4, 64


def per_element(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each element's own scale, by index arithmetic."""
    rows = torch.arange(shape[0]) * scale.shape[0] // shape[0]
    columns = torch.arange(shape[1]) * scale.shape[1] // shape[1]
    return scale[rows[:, None], columns[None]]


def reference(x: torch.Tensor, qparams: QParams, spec: QuantSpec) -> np.ndarray:
    """The formula in numpy: one float32 division, the nearest number by search, clamp, multiply."""
    scale = per_element(qparams.scale, x.shape).numpy()
    step = scale if qparams.global_scale is None else scale * qparams.global_scale.numpy()
    zero = 0 if qparams.zero_point is None else per_element(qparams.zero_point, x.shape).numpy()
    offset = 0 if qparams.offset is None else per_element(qparams.offset, x.shape).numpy()
    position = (x.numpy() - offset) / step
    numbers = numbers_of(spec.format).numpy()
    match spec.format:
        case IntFormat():
            value = np.clip(np.rint(position) + zero, numbers[0], numbers[-1]) - zero
        case FixedFormat(_, fraction_bits):
            value = (np.rint(position * 2**fraction_bits) / 2**fraction_bits).clip(numbers[0], numbers[-1])
        case LevelFormat():
            middles = (numbers[1:] + numbers[:-1]) / np.float32(2)
            value = numbers[
                np.searchsorted(middles, position, "left" if spec.format.ties == "down" else "right")
            ]
        case StretchedFormat(count):  # ParetoQ, models/utils_quant.py: StretchedElasticQuant.forward
            n, shift = np.float32(count / 2), np.float32(0 if count % 2 else 0.5)
            clipped = np.clip(position, np.float32(-0.99), np.float32(0.99))
            value = (np.rint(clipped * n - shift) + shift) / n
        case _:
            value = nearest(position.astype(np.float64), numbers.astype(np.float64))
    return value.astype(np.float32) * step + offset


def nearest(position: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """By search; ties to the even code."""
    above = np.searchsorted(numbers, position).clip(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    # Codes of one sign are consecutive, so the even one of two neighbours is at an even distance from 0.
    low_is_even = (above - 1 - len(numbers) // 2) % 2 == 0
    nearer = (position - low < high - position) | ((position - low == high - position) & low_is_even)
    return np.where(nearer, low, high)


@over("spec", SPECS)
def test_against_the_formula_in_numpy(spec: QuantSpec) -> None:
    x = sample()
    qparams = qparams_of(x, spec)
    np.testing.assert_array_equal(fake_quantize(x, qparams, spec).numpy(), reference(x, qparams, spec))


@over("spec", SPECS)
def test_fake_quantize_is_dequantize_of_quantize(spec: QuantSpec) -> None:
    x = sample()
    qparams = qparams_of(x, spec)
    codes = quantize(x, qparams, spec)
    assert codes.shape == x.shape
    assert codes.dtype == spec.format.code_dtype
    y = dequantize(codes, qparams, spec)
    np.testing.assert_array_equal(bits(fake_quantize(x, qparams, spec)), bits(y))
    for dtype in (torch.float16, torch.bfloat16):
        half = sample().clamp(-1000, 1000).to(dtype)
        expected = dequantize(quantize(half, qparams, spec), qparams, spec).to(dtype)
        assert torch.equal(fake_quantize(half, qparams, spec), expected)


@over("spec", SPECS)
def test_the_dtype_does_not_decide(spec: QuantSpec) -> None:
    x = torch.randint(-127, 128, (8, 64)) / 32  # exact in bfloat16 and in float16
    x[2] *= 64
    whole = qparams_of(x, spec)
    codes = quantize(x, whole, spec)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        qparams = qparams_of(half, spec)
        assert torch.equal(qparams.scale, whole.scale)
        assert torch.equal(quantize(half, qparams, spec), codes)
        assert fake_quantize(half, qparams, spec).dtype == dtype


@over("spec", SPECS)
def test_saturation(spec: QuantSpec) -> None:
    x = sample()
    qparams = qparams_of(x, spec)
    far = spec.format.decode(quantize(x * 1e9, qparams, spec))[x.abs() > 1e-3]
    assert far.numel()
    assert ((far == spec.format.lo) | (far == spec.format.hi)).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinity_saturates(value: float) -> None:
    for grid in (IntFormat(4), FloatFormat(2, 1), FloatFormat(4, 3, specials="nan")):
        spec = QuantSpec(format=grid, granularity=per_channel, scale_rule="narrow", ranges="static")
        qparams = QParams(scale=torch.ones(1, 1))
        bound = grid.hi if value > 0 else grid.lo
        assert fake_quantize(torch.tensor([[value, 0.0]]), qparams, spec).tolist() == [[bound, 0.0]]


# --- properties ------------------------------------------------------------------------------------------

numbers = st.floats(-(2.0**20), 2.0**20, width=32) | st.integers(-32, 32).map(lambda n: n / 4)
tensors = arrays(np.float32, (ROWS, COLUMNS), elements=numbers, fill=st.just(0.75)).map(torch.tensor)
specs = st.sampled_from(SPECS)
property_ = settings(deadline=None, derandomize=True, max_examples=25, database=None)


@property_
@given(tensors, specs)
def test_idempotent(x: torch.Tensor, spec: QuantSpec) -> None:
    qparams = qparams_of(x, spec)
    codes = quantize(x, qparams, spec)
    y = dequantize(codes, qparams, spec)
    again = quantize(y, qparams, spec)
    negative_zero = (y == 0) & (codes != again)  # its code decodes to 0.0, whose code is another
    if not spec.has_offset:  # q * step + offset has fewer bits for q, the larger the offset
        assert torch.equal(codes[~negative_zero], again[~negative_zero])
    np.testing.assert_array_equal(bits(dequantize(again, qparams, spec)), bits(y))


@property_
@given(tensors, specs)
def test_monotone(x: torch.Tensor, spec: QuantSpec) -> None:
    one = QuantSpec(
        format=spec.format,
        granularity=per_channel,
        scale_rule=spec.scale_rule,
        scale_format=spec.scale_format,
        global_scale=spec.global_scale,
        ranges="dynamic",
    )
    ordered = x.sort(dim=1).values
    y = fake_quantize(ordered, qparams_of(x, one), one)
    assert (y.diff(dim=1) >= 0).all()


@property_
@given(tensors, specs)
def test_nothing_on_the_grid_is_nearer(x: torch.Tensor, spec: QuantSpec) -> None:
    """Half a step for integers and half an ulp for floats, inside the range and at its ends."""
    qparams = qparams_of(x, spec)
    step = per_element(qparams.step, x.shape).double()
    zero = 0 if qparams.zero_point is None else per_element(qparams.zero_point, x.shape).double()
    grid = numbers_of(spec.format).double()
    y = fake_quantize(x, qparams, spec).double()
    offset = 0.0 if qparams.offset is None else per_element(qparams.offset, x.shape).double()
    candidates = (grid[:, None, None] - zero) * step + offset
    closest = (candidates - x).abs().amin(0)
    # One float32 rounding of x - offset, x / step, the product and the sum; one of a midpoint, below hi.
    middle = 0.0 if isinstance(spec.format, IntFormat | FloatFormat) else spec.format.hi * step.abs()
    slack = 2.0**-24 * (x.abs() + y.abs() + 3 * torch.as_tensor(offset).abs() + middle)
    assert ((y - x).abs() <= closest + slack).all()


@property_
@given(tensors, specs)
def test_zero_stays_zero_where_the_lattice_has_it(x: torch.Tensor, spec: QuantSpec) -> None:
    x[:, 1::3] = 0.0
    zeros = fake_quantize(x, qparams_of(x, spec), spec)[:, 1::3]
    if spec.keeps_zero:
        assert (zeros == 0).all()
    elif not spec.format.has_zero:
        assert (zeros != 0).all()


@property_
@given(tensors, st.sampled_from([spec for spec in SPECS if is_odd(spec.format) and spec.symmetric]))
def test_symmetric_grids_are_odd(x: torch.Tensor, spec: QuantSpec) -> None:
    qparams = qparams_of(x, spec)
    assert torch.equal(fake_quantize(-x, qparams, spec), -fake_quantize(x, qparams, spec))


@property_
@given(tensors, specs, st.sampled_from([8, 16]), st.randoms(use_true_random=False))
def test_permuting_groups_permutes_what_they_become(
    x: torch.Tensor, spec: QuantSpec, size: int, random: object
) -> None:
    spec = replace(spec, granularity=per_group(size))
    order = list(range(COLUMNS // size))
    random.shuffle(order)
    columns = torch.cat([torch.arange(size) + block * size for block in order])
    y = fake_quantize(x, qparams_of(x, spec), spec)
    moved = x[:, columns].flip(0)
    assert torch.equal(fake_quantize(moved, qparams_of(moved, spec), spec), y[:, columns].flip(0))


def test_a_format_and_groups_of_ones_own() -> None:
    """E3M2 in groups of 24, in numpy and gfloat alone."""
    x = sample(columns=72)
    spec = QuantSpec(
        format=FloatFormat(3, 2), granularity=per_group(24), scale_rule="narrow", ranges="dynamic"
    )
    blocks = x.numpy().reshape(-1, 24)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(28)
    scale[scale == 0] = 1
    rounded = round_ndarray(
        format_info_ocp_e3m2, (blocks / scale).astype(np.float64), RoundMode.TiesToEven, sat=True
    )
    y = fake_quantize(x, qparams_of(x, spec), spec).numpy()
    np.testing.assert_array_equal(bits(y), bits((rounded.astype(np.float32) * scale).reshape(x.shape)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@over("spec", SPECS)
def test_there_are_no_codes_of_what_is_not_finite(spec: QuantSpec, value: float) -> None:
    x = sample()
    good = qparams_of(x, spec)
    x[2, 5] = value
    with pytest.raises(ValueError, match=r"codes of NaN or infinity asked, and there are none"):
        quantize(x, good, spec)
    own = qparams_of(x, spec)
    assert own.scale.isnan().any()
    with pytest.raises(ValueError, match=r"codes of NaN or infinity asked, and there are none"):
        quantize(sample(), own, spec)
    assert fake_quantize(x, own, spec)[2, 5].isnan()
    assert fake_quantize(x, good, spec)[2, 5].isnan() == (value != value)
