"""The tables every test of this folder runs over: a new format or lattice is one row here.

`FLOATS` pairs each float format with gfloat's description of it and, where there is one, with the scalar
type of ml_dtypes. `SPECS` are the lattices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import Domain, FormatInfo, decode_ndarray
from gfloat import formats as known

from recoup.numerics import (
    BFLOAT16,
    BINARY,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    FLOAT16,
    FLOAT32,
    MXINT8,
    NF4,
    STRETCHED,
    TERNARY,
    ElementFormat,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    LevelFormat,
    QuantSpec,
    ScaleRule,
    StretchedFormat,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)


@dataclass(frozen=True)
class FloatRow:
    """A float format and who else knows it."""

    grid: FloatFormat
    info: FormatInfo
    scalar: Any = None  # of ml_dtypes or numpy

    @property
    def numbers(self) -> np.ndarray:
        """Every finite value, ascending, from gfloat's own decoder; +0 and -0 are one."""
        values = decode_ndarray(self.info, np.arange(2**self.info.k))
        return np.unique(values[np.isfinite(values)]).astype(np.float32)


def by_hand(grid: FloatFormat) -> FormatInfo:
    """gfloat's words for the counts of a format that no table lists."""
    return FormatInfo(
        name=f"{grid.name}-{grid.specials}",
        k=1 + grid.exponent_bits + grid.mantissa_bits,
        precision=1 + grid.mantissa_bits,
        bias=2 ** (grid.exponent_bits - 1) - 1,
        is_signed=True,
        domain=Domain.Extended if grid.specials == "ieee" else Domain.Finite,
        has_nz=True,
        num_high_nans={"none": 0, "nan": 1, "ieee": 2**grid.mantissa_bits - 1}[grid.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )


# Every format of at most 8 bits that can be made by hand, but for those with no number above 0.
BY_HAND = tuple(
    FloatFormat(exponent_bits, mantissa_bits, specials=specials)
    for exponent_bits in range(1, 8)
    for mantissa_bits in range(8 - exponent_bits)
    for specials in ("none", "nan", "ieee")
    if (exponent_bits, mantissa_bits, specials) not in ((1, 0, "nan"), (1, 0, "ieee"))
)
_E4M3_IEEE, _E3M4_IEEE = FloatFormat(4, 3, specials="ieee"), FloatFormat(3, 4, specials="ieee")
_LISTED = (E2M1, E2M3, E3M2, E4M3, E5M2, _E4M3_IEEE, _E3M4_IEEE)
FLOATS = (
    FloatRow(E2M1, known.format_info_ocp_e2m1, ml_dtypes.float4_e2m1fn),
    FloatRow(E2M3, known.format_info_ocp_e2m3, ml_dtypes.float6_e2m3fn),
    FloatRow(E3M2, known.format_info_ocp_e3m2, ml_dtypes.float6_e3m2fn),
    FloatRow(E4M3, known.format_info_ocp_e4m3, ml_dtypes.float8_e4m3fn),
    FloatRow(E5M2, known.format_info_ocp_e5m2, ml_dtypes.float8_e5m2),
    FloatRow(_E4M3_IEEE, by_hand(_E4M3_IEEE), ml_dtypes.float8_e4m3),
    FloatRow(_E3M4_IEEE, by_hand(_E3M4_IEEE), ml_dtypes.float8_e3m4),
    *(FloatRow(grid, by_hand(grid)) for grid in BY_HAND if grid not in _LISTED),
    FloatRow(FLOAT16, known.format_info_binary16, np.float16),
    FloatRow(BFLOAT16, known.format_info_bfloat16, ml_dtypes.bfloat16),
)
CODED = tuple(row for row in FLOATS if row.info.k <= 8)

INTS = tuple(
    IntFormat(bits, signed=signed, narrow=narrow)
    for bits in range(2, 9)
    for signed, narrow in ((True, False), (True, True), (False, False))
)
FIXED = (MXINT8, FixedFormat(8, 6, narrow=True), FixedFormat(8, 1), FixedFormat(4, 3), FixedFormat(2, 1))
UNEVEN = LevelFormat("uneven", (-2.5, -1.0, 0.0, 0.1, 4.0), ties="up")
LEVELS = (NF4, BINARY, TERNARY, STRETCHED, StretchedFormat(5), StretchedFormat(16), UNEVEN)


def name_of(row: Any) -> str:
    """A test id: what is in the row, never its position."""
    match row:
        case FloatRow():
            return f"{row.grid.name}-{row.grid.specials}"
        case IntFormat() | FixedFormat():
            return row.name + "-narrow" * row.narrow
        case QuantSpec():
            stored = row.scale_format.name + "-global" * row.global_scale
            return f"{name_of(row.format)}-{row.granularity}-{row.scale_rule}-{stored}"
        case _:
            return str(getattr(row, "name", row))


def over(name: str, rows: Any) -> pytest.MarkDecorator:
    """Parametrize by the rows of a table."""
    return pytest.mark.parametrize(name, rows, ids=name_of)


def around(numbers: np.ndarray) -> np.ndarray:
    """Every number, every midpoint, one float32 ulp to both sides of each, and what lies beyond the range."""
    numbers = numbers.astype(np.float32)
    wide = numbers.astype(np.float64)
    middles = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
    top = wide[-1] + (wide[-1] - wide[-2]) * np.array([0.25, 0.5, 0.75, 1.0, 1.5, 3.0])
    largest = float(np.finfo(np.float32).max)
    beyond = np.minimum([*top, 2 * wide[-1], 1e30, largest], largest).astype(np.float32)
    points = np.concatenate([numbers, middles, beyond, -beyond])
    with np.errstate(over="ignore", under="ignore"):  # one step past float32's largest is infinity
        up = np.nextafter(points, np.float32(np.inf))
        down = np.nextafter(points, np.float32(-np.inf))
    every = np.concatenate([points, up, down, np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38], np.float32)])
    return every[np.isfinite(every)]


def bits(x: Any) -> np.ndarray:
    """float32 as its bit patterns, so that -0 and +0 differ."""
    return np.asarray(x, dtype=np.float32).view(np.int32)


_ROWS_OF_INTS: tuple[ScaleRule, ...] = ("half-range", "narrow", "no-clip", "signed-max", "affine", "pow2")
_MX: tuple[ScaleRule, ...] = ("floor", "even", "ceil", "rceil")


def _spec(grid: Any, granularity: Granularity, rule: ScaleRule, **fields: Any) -> QuantSpec:
    fields.setdefault("ranges", "dynamic")
    return QuantSpec(format=grid, granularity=granularity, scale_rule=rule, **fields)


def _specs() -> Iterator[QuantSpec]:
    for grid in INTS:
        for rule in _ROWS_OF_INTS:
            if rule == "affine" or (grid.signed and (not grid.narrow or rule == "narrow")):
                yield _spec(grid, per_group(4), rule)
    for granularity in (per_tensor, per_channel, per_block(2, 8)):
        for rule in _ROWS_OF_INTS:
            yield _spec(IntFormat(4), granularity, rule)
        yield _spec(IntFormat(8, signed=False), granularity, "affine")
        yield _spec(E2M1, granularity, "narrow")
        yield _spec(E4M3, granularity, "narrow")
    for grid in (E2M1, E2M3, E3M2, E4M3, E5M2, FloatFormat(3, 4), FloatFormat(4, 2)):
        yield _spec(grid, per_group(4), "narrow")
        for rule in _MX:
            yield _spec(grid, per_group(32), rule, scale_format=E8M0)
    for rule in _MX:
        yield _spec(IntFormat(8), per_group(32), rule, scale_format=E8M0)
    for stored in (FLOAT16, BFLOAT16, E4M3, E8M0, FloatFormat(5, 3, specials="ieee")):
        for rule in ("narrow", "affine", "signed-max"):
            if not (rule == "signed-max" and stored is E8M0):
                yield _spec(IntFormat(4), per_group(8), rule, scale_format=stored)
        yield _spec(E2M1, per_group(16), "narrow", scale_format=stored)
    yield _spec(E2M1, per_group(16), "narrow", scale_format=E4M3, global_scale=True)  # NVFP4
    yield _spec(IntFormat(4), per_group(16), "narrow", scale_format=E4M3, global_scale=True)
    yield _spec(E2M1, per_block(4, 16), "narrow", scale_format=E4M3, global_scale=True)
    yield from _specs_of_levels()
    yield from _specs_with_offsets()
    for granularity in (per_group(16), per_block(4, 16)):
        for global_scale in (True, False):
            fields = {"scale_format": E4M3, "global_scale": global_scale}
            yield _spec(E2M1, granularity, "four-over-six", **fields)
    for grid in FIXED:
        yield _spec(grid, per_group(4), "narrow")
    for rule in _MX:
        yield _spec(MXINT8, per_group(32), rule, scale_format=E8M0)
    # GGUF: Q8_0, Q4_0, TQ2_0 (whose block of 256 has 64 values here), Q8_K
    yield _spec(IntFormat(8, narrow=True), per_group(32), "narrow", scale_format=FLOAT16)
    yield _spec(IntFormat(4), per_group(32), "signed-max", scale_format=FLOAT16)
    yield _spec(IntFormat(2, narrow=True), per_group(64), "narrow", scale_format=FLOAT16)
    yield _spec(IntFormat(8, narrow=True), per_group(64), "signed-max")


def _specs_of_levels() -> Iterator[QuantSpec]:
    for grid in LEVELS:
        for rule in ("amax", "mean"):
            yield _spec(grid, per_group(16), rule)
        yield _spec(grid, per_channel, "narrow", scale_format=FLOAT16)
    yield _spec(NF4, per_group(32), "even", scale_format=E8M0)
    yield _spec(TERNARY, per_block(2, 8), "amax", scale_format=BFLOAT16)
    yield _spec(IntFormat(3), per_group(16), "mean")


def _specs_with_offsets() -> Iterator[QuantSpec]:
    for grid in (IntFormat(4, signed=False), IntFormat(4), IntFormat(2), E2M1, NF4, MXINT8):
        for stored in (FLOAT16, FLOAT32):
            yield _spec(grid, per_group(32), "min-max", scale_format=stored)
    yield _spec(IntFormat(8, signed=False), per_tensor, "min-max")


SPECS = tuple(_specs())
NVFP4 = next(spec for spec in SPECS if spec.global_scale)


def numbers_of(grid: ElementFormat) -> torch.Tensor:
    """Every value of an element format, ascending, without asking the format to decode anything."""
    match grid:
        case IntFormat():
            top = 2 ** (grid.bits - grid.signed)
            return torch.arange(-top + grid.narrow if grid.signed else 0, top).float()
        case FixedFormat():
            return numbers_of(IntFormat(grid.bits, narrow=grid.narrow)) / 2**grid.fraction_bits
        case LevelFormat():
            return torch.tensor(grid.levels)
        case StretchedFormat():  # the middles of equal parts of -1 to 1
            return torch.tensor([(2 * k + 1) / grid.count - 1 for k in range(grid.count)])
        case _:
            return torch.tensor(FloatRow(grid, by_hand(grid)).numbers)


def is_odd(grid: ElementFormat) -> bool:
    """Rounding -x is rounding x: the values are symmetric, and so is where ties go."""
    numbers = numbers_of(grid)
    return grid.has_zero and not isinstance(grid, LevelFormat) and torch.equal(numbers, -numbers.flip(0))


def sample(rows: int = 8, columns: int = 64) -> torch.Tensor:
    """Every kind of block: plain, ties, one outlier, one sign only, zeros, tiny and huge values."""
    x = torch.randn(rows, columns)
    x[1] = torch.randint(-16, 17, (columns,)) / 4
    x[2, 3] = 300.0
    x[3] = x[3].abs()
    x[4] = -x[4].abs()
    x[5] = 0.0
    x[6] *= 1e-6
    x[7, : columns // 2] *= 1e6
    x[7, columns // 2 :] = -0.0
    return x
