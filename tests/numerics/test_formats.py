"""Every code, midpoint and neighbour of every format, against gfloat, ml_dtypes, numpy and torch."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import RoundMode, decode_ndarray, encode_ndarray, round_ndarray
from gfloat.formats import format_info_ocp_e8m0, format_info_ocp_int8

from recoup.numerics import (
    BFLOAT16,
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    FLOAT16,
    FLOAT32,
    MXINT8,
    NF4,
    STRETCHED,
    TERNARY,
    FixedFormat,
    FloatFormat,
    IntFormat,
    LevelFormat,
    StretchedFormat,
)
from recoup.numerics.floats import power_of_two_below
from recoup.numerics.formats import Format

from .tables import CODED, FIXED, FLOATS, INTS, LEVELS, FloatRow, around, bits, numbers_of, over


def saturated(grid: Format, x: np.ndarray) -> torch.Tensor:
    return grid.rint(torch.tensor(x)).clamp(grid.lo, grid.hi)


@over("row", FLOATS)
def test_range_is_gfloats(row: FloatRow) -> None:
    assert (row.grid.lo, row.grid.hi) == (row.numbers[0], row.numbers[-1])
    assert row.grid.bits == row.info.k


@over("row", FLOATS)
def test_floor_is_the_smallest_positive_number_that_float32_can_divide_by(row: FloatRow) -> None:
    positive = row.numbers[row.numbers >= np.finfo(np.float32).tiny]
    assert row.grid.floor == positive.min()


# Where one exponent bit is all special, gfloat saturates at a value that its decoder calls infinity.
@over("row", [row for row in FLOATS if row.info.max == row.numbers[-1]])
def test_rounding_is_gfloats(row: FloatRow) -> None:
    x = around(row.numbers)
    oracle = round_ndarray(row.info, x.astype(np.float64), RoundMode.TiesToEven, sat=True)
    np.testing.assert_array_equal(bits(saturated(row.grid, x)), bits(oracle))


@over("row", FLOATS)
def test_infinity_saturates_and_nan_stays(row: FloatRow) -> None:
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(saturated(row.grid, x).numpy(), [row.grid.hi, row.grid.lo, np.nan])


@over("row", [row for row in FLOATS if row.scalar is not None])
def test_rounding_is_ml_dtypes(row: FloatRow) -> None:
    # Saturate first: beyond the range its casts give NaN or infinity where the format has them.
    x = around(row.numbers).clip(row.grid.lo, row.grid.hi)
    oracle = x.astype(row.scalar).astype(np.float32)
    np.testing.assert_array_equal(bits(saturated(row.grid, x)), bits(oracle))


@over("row", CODED)
def test_codes_are_gfloats(row: FloatRow) -> None:
    values = saturated(row.grid, around(row.numbers))
    oracle = encode_ndarray(row.info, values.double().numpy())
    np.testing.assert_array_equal(row.grid.encode(values).numpy(), oracle)


@over("row", [row for row in CODED if row.scalar is not None])
def test_codes_are_ml_dtypes(row: FloatRow) -> None:
    values = saturated(row.grid, around(row.numbers))
    oracle = values.numpy().astype(row.scalar).view(np.uint8)
    np.testing.assert_array_equal(row.grid.encode(values).numpy(), oracle)


@over("row", CODED)
def test_every_code_decodes_as_gfloat_does(row: FloatRow) -> None:
    codes = np.arange(2**row.info.k)
    oracle = decode_ndarray(row.info, codes).astype(np.float32)
    decoded = row.grid.decode(torch.tensor(codes)).numpy()
    numbers = ~np.isnan(oracle)
    np.testing.assert_array_equal(np.isnan(decoded), ~numbers)
    np.testing.assert_array_equal(bits(decoded[numbers]), bits(oracle[numbers]))


@over("row", CODED)
def test_every_number_comes_back_as_its_code(row: FloatRow) -> None:
    codes = torch.arange(2**row.info.k, dtype=torch.uint8)
    codes = codes[row.grid.decode(codes).isfinite()]
    assert torch.equal(row.grid.encode(row.grid.decode(codes)), codes)


@pytest.mark.parametrize(
    ("grid", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_torch_float8(grid: FloatFormat, dtype: torch.dtype) -> None:
    row = next(row for row in FLOATS if row.grid == grid)
    # Clamped first: what torch's cast does past the range differs by version (NaN, infinity or 448).
    x = torch.tensor(around(row.numbers)).clamp(grid.lo, grid.hi)
    assert torch.equal(grid.encode(grid.rint(x)), x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize(
    ("grid", "dtype"), [(FLOAT16, torch.float16), (BFLOAT16, torch.bfloat16)], ids=["float16", "bfloat16"]
)
def test_torch_half(grid: FloatFormat, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = patterns.view(dtype).float()
    numbers = values[values.isfinite()]
    np.testing.assert_array_equal(bits(grid.rint(numbers)), bits(numbers))
    row = next(row for row in FLOATS if row.grid == grid)
    x = torch.tensor(around(row.numbers)).clamp(grid.lo, grid.hi)
    np.testing.assert_array_equal(bits(grid.rint(x)), bits(x.to(dtype).float()))


def test_float32_is_left_alone() -> None:
    patterns = torch.randint(-(2**31), 2**31, (2**17,)).to(torch.int32)
    edges = torch.tensor(around(np.float32(2.0) ** np.arange(-126, 128)))
    x = torch.cat([patterns.view(torch.float32), edges])
    x = x[x.isfinite()]
    np.testing.assert_array_equal(bits(FLOAT32.rint(x)), bits(x))
    assert (FLOAT32.hi, FLOAT32.floor) == (np.finfo(np.float32).max, np.finfo(np.float32).tiny)


def test_e2m1_ties() -> None:
    # The seven ties of E2M1 and where they go: to the even code (OCP Microscaling v1.0, section 5.3.3).
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.rint(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert E2M1.encode(-E2M1.rint(ties)).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_e8m0_against_gfloat_and_ml_dtypes() -> None:
    codes = np.arange(256)
    values = E8M0.decode(torch.tensor(codes))
    np.testing.assert_array_equal(values.numpy(), decode_ndarray(format_info_ocp_e8m0, codes))
    np.testing.assert_array_equal(
        values.numpy(), codes.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )
    assert torch.equal(E8M0.encode(values), torch.tensor(codes, dtype=torch.uint8))
    np.testing.assert_array_equal(E8M0.rint(values[:255]).numpy(), values[:255].numpy())

    x = around(values[:255].numpy())
    x = x[x >= 0]
    assert (saturated(E8M0, x[x < E8M0.lo]) == E8M0.lo).all()
    x = x[x >= E8M0.lo]
    oracle = round_ndarray(format_info_ocp_e8m0, x.astype(np.float64), RoundMode.TiesToAway, sat=True)
    np.testing.assert_array_equal(saturated(E8M0, x).numpy(), oracle)
    assert (E8M0.lo, E8M0.hi) == (format_info_ocp_e8m0.min, format_info_ocp_e8m0.max)
    # Not ml_dtypes below 2^-126: it rounds 1.5 * 2^-127 down. Above, up to its overflow to NaN, it agrees.
    x = x[(x >= 2.0**-126) & (x < 1.5 * 2.0**127)]
    np.testing.assert_array_equal(
        saturated(E8M0, x).numpy(), x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )


def test_power_of_two_below_is_frexps() -> None:
    x = around(np.float32(2.0) ** np.arange(-126, 128))
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]
    _, exponent = np.frexp(x.astype(np.float64))
    np.testing.assert_array_equal(power_of_two_below(torch.tensor(x)).numpy(), 2.0 ** (exponent - 1))


@over("grid", INTS)
def test_integers(grid: IntFormat) -> None:
    # Two's complement, or counting from 0, as numpy and ml_dtypes bound them.
    info = {
        (2, True): ml_dtypes.iinfo(ml_dtypes.int2),
        (2, False): ml_dtypes.iinfo(ml_dtypes.uint2),
        (4, True): ml_dtypes.iinfo(ml_dtypes.int4),
        (4, False): ml_dtypes.iinfo(ml_dtypes.uint4),
        (8, True): np.iinfo(np.int8),
        (8, False): np.iinfo(np.uint8),
    }.get((grid.bits, grid.signed))
    if info is not None:
        assert (grid.lo, grid.hi) == (int(info.min) + grid.narrow, int(info.max))
    every = np.arange(grid.lo, grid.hi + 1, dtype=np.float32)
    assert len(every) == 2**grid.bits - grid.narrow
    codes = grid.encode(torch.tensor(every))
    assert codes.dtype == grid.code_dtype == (torch.int8 if grid.signed else torch.uint8)
    np.testing.assert_array_equal(codes.numpy(), every)
    np.testing.assert_array_equal(grid.decode(codes).numpy(), every)
    assert int(grid.hi).bit_length() - 1 == grid.mantissa_bits

    x = around(every)
    oracle = np.rint(x).clip(every.min(), every.max())
    np.testing.assert_array_equal(saturated(grid, x).numpy(), oracle)
    assert not saturated(grid, x)[torch.tensor(oracle == 0)].signbit().any()


@over("grid", FIXED)
def test_fixed_point(grid: FixedFormat) -> None:
    numbers = numbers_of(grid).numpy()
    assert (grid.lo, grid.hi, grid.floor) == (numbers[0], numbers[-1], 2.0**-grid.fraction_bits)
    codes = grid.encode(torch.tensor(numbers))
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(codes.numpy(), numbers * 2**grid.fraction_bits)
    np.testing.assert_array_equal(grid.decode(codes).numpy(), numbers)
    x = around(numbers)
    oracle = np.rint(x.astype(np.float64) * 2**grid.fraction_bits) / 2**grid.fraction_bits
    np.testing.assert_array_equal(saturated(grid, x).numpy(), oracle.clip(grid.lo, grid.hi))
    assert not saturated(grid, x)[torch.tensor(oracle == 0)].signbit().any()


def test_mxint8_is_gfloats() -> None:
    info = format_info_ocp_int8
    codes = np.arange(256)
    values = decode_ndarray(info, codes).astype(np.float32)
    np.testing.assert_array_equal(MXINT8.decode(torch.tensor(codes.astype(np.int8))).numpy(), values)
    x = around(np.sort(values))
    oracle = round_ndarray(info, x.astype(np.float64), RoundMode.TiesToEven, sat=True)
    np.testing.assert_array_equal(saturated(MXINT8, x).numpy(), oracle)
    ours = MXINT8.encode(saturated(MXINT8, x)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(ours, encode_ndarray(info, oracle))


@over("grid", LEVELS)
def test_levels(grid: LevelFormat | StretchedFormat) -> None:
    numbers = numbers_of(grid)
    assert grid.bits == math.ceil(math.log2(len(numbers)))
    assert (grid.lo, grid.hi) == (numbers[0], numbers[-1])
    assert grid.floor == numbers[numbers > 0].min()
    assert grid.has_zero == (0.0 in numbers.tolist())
    codes = grid.encode(numbers)
    assert codes.dtype == grid.code_dtype == torch.uint8
    assert codes.tolist() == list(range(len(numbers)))
    assert torch.equal(grid.decode(codes), numbers)
    np.testing.assert_array_equal(bits(saturated(grid, numbers.numpy())), bits(numbers))
    # The nearest one everywhere but at midpoints; those are in the tests below.
    x = around(numbers.numpy())
    distance = np.abs(x.astype(np.float64)[:, None] - numbers.double().numpy())
    found = np.abs(saturated(grid, x).double().numpy() - x)
    assert (found <= distance.min(1) + 2.0**-24 * (grid.hi + np.abs(x))).all()


@over("grid", [*LEVELS, *FIXED])
def test_infinity_saturates_and_nan_stays_in_tables_too(grid: Format) -> None:
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(saturated(grid, x).numpy(), [grid.hi, grid.lo, np.nan])


def test_nf4_ties_go_down() -> None:
    # The thresholds of bitsandbytes, csrc/kernels.cu: dQuantizeNF4, which asks x > threshold.
    thresholds = np.float32(
        [
            *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
            *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
            *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
            *(0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
        ]
    )
    at, above = thresholds, np.nextafter(thresholds, np.float32(2))
    assert NF4.encode(NF4.rint(torch.tensor(at))).tolist() == list(range(15))
    assert NF4.encode(NF4.rint(torch.tensor(above))).tolist() == list(range(1, 16))


def test_paretoqs_ties() -> None:
    # round((clip(x) * n - shift)), ties to even: 1 / 3 is inexact, 0.5 of 2 bits is not.
    assert STRETCHED.rint(torch.tensor([0.0, -0.0, 0.5, -0.5])).tolist() == [0.25, 0.25, 0.25, -0.75]
    assert TERNARY.rint(torch.tensor([0.33, -0.33, 0.34, -0.34, 0.99])).tolist() == [
        *(0.0, 0.0, TERNARY.hi, TERNARY.lo, TERNARY.hi)
    ]
    assert not TERNARY.rint(torch.tensor([-0.1])).signbit()


def test_a_format_without_a_mantissa_rounds_ties_to_the_even_exponent() -> None:
    # Codes 1, 2, 3, 4 of FloatFormat(3, 0) are 2^-2, 2^-1, 2^0, 2^1.
    x = torch.tensor([0.375, 0.75, 1.5, -0.375])
    assert FloatFormat(3, 0).rint(x).tolist() == [0.5, 0.5, 2.0, -0.5]
