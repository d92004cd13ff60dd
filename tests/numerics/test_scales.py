"""From extrema to scales: every rule by its formula, in exact or float64 arithmetic written here."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

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
    ElementFormat,
    FixedFormat,
    FloatFormat,
    IntFormat,
    PowerOfTwo,
    QParams,
    QuantSpec,
    ScaleRule,
    choose_global_scale,
    choose_qparams,
    dequantize,
    fake_quantize,
    per_channel,
    per_group,
    per_tensor,
    qparams_of,
    quantize,
    storable,
)

from .tables import NVFP4, SPECS, bits, over, sample


def spec_of(grid: ElementFormat, rule: ScaleRule, **fields: object) -> QuantSpec:
    return QuantSpec(
        **{"format": grid, "granularity": per_tensor, "scale_rule": rule, "ranges": "dynamic", **fields}
    )


def scale_of(lo: float, hi: float, spec: QuantSpec) -> QParams:
    return choose_qparams(torch.tensor([[lo]]), torch.tensor([[hi]]), spec)


INT4, INT8, UINT4 = IntFormat(4), IntFormat(8), IntFormat(4, signed=False)
NARROW4, NARROW8 = IntFormat(4, narrow=True), IntFormat(8, narrow=True)

# format, rule, lowest, highest, scale, zero point: the formulas of the rules' table, with numbers filled in
BY_HAND = [
    (INT4, "half-range", -3.0, 2.0, 3.0 / 7.5, None),
    (INT8, "half-range", -3.0, 5.0, 5.0 / 127.5, None),
    (NARROW4, "half-range", -3.0, 2.0, 3.0 / 7, None),
    (INT4, "narrow", -3.0, 2.0, 3.0 / 7, None),
    (INT8, "narrow", -0.3, 12.7, float(np.float32(12.7)) / 127, None),
    (E4M3, "narrow", -3.0, 2.0, 3.0 / 448, None),
    (E2M1, "narrow", -3.0, 2.0, 3.0 / 6, None),
    (INT4, "no-clip", -3.0, 2.0, 3.0 / 8, None),
    (INT4, "no-clip", -2.0, 3.0, 3.0 / 7, None),
    (INT4, "no-clip", -8.0, 7.5, 7.5 / 7, None),
    (INT4, "signed-max", -3.0, 2.0, 3.0 / 8, None),
    (INT4, "signed-max", -2.0, 3.0, 3.0 / -8, None),
    (INT8, "signed-max", -2.0, 3.0, 3.0 / -128, None),
    (UINT4, "affine", -1.0, 2.0, 3.0 / 15, 5),
    (UINT4, "affine", 1.0, 3.0, 3.0 / 15, 0),  # zero always counts as inside
    (UINT4, "affine", -3.0, -1.0, 3.0 / 15, 15),
    (INT4, "affine", -1.0, 2.0, 3.0 / 15, -3),
    (INT8, "affine", -1.0, 4.0, 5.0 / 255, -77),
    (INT4, "pow2", -3.0, 7.0, 1.0, None),
    (INT4, "pow2", -3.0, 7.5, 2.0, None),
    (INT4, "pow2", -3.5, 1.0, 0.5, None),
    (INT8, "pow2", 0.0, 1.0, 2.0**-6, None),
    (INT8, "pow2", 0.0, 127 / 128, 2.0**-7, None),
    (E4M3, "pow2", 0.0, 448.0, 1.0, None),
    (E4M3, "pow2", 0.0, 449.0, 2.0, None),
    (NF4, "amax", -3.0, 2.0, 3.0, None),
    (STRETCHED, "amax", -1.0, 2.0, 2.0, None),
    (INT4, "amax", -1.0, 2.0, 2.0, None),
    (INT8, "signed-max", -2.0, 1.0, 2.0 / 128, None),
    (NARROW8, "signed-max", -1.0, 2.0, 2.0 / -127, None),
    (UINT4, "min-max", 1.0, 4.0, 3.0 / 15, None),
    (INT4, "min-max", -4.0, -1.0, 3.0 / 15, None),
]


@pytest.mark.parametrize(("grid", "rule", "lo", "hi", "scale", "zero"), BY_HAND, ids=str)
def test_rules_by_hand(
    grid: IntFormat, rule: ScaleRule, lo: float, hi: float, scale: float, zero: int | None
) -> None:
    qparams = scale_of(lo, hi, spec_of(grid, rule))
    assert qparams.scale.item() == np.float32(scale)
    assert (None if qparams.zero_point is None else qparams.zero_point.item()) == zero


def test_min_max_takes_the_extrema_as_they_are() -> None:
    spec = spec_of(UINT4, "min-max", scale_format=FLOAT16)
    qparams = scale_of(1.1, 4.1, spec)  # ggml: d = (max - min) / 15 and m = min, both float16
    assert qparams.scale.item() == np.float16((np.float32(4.1) - np.float32(1.1)) / 15)
    assert qparams.offset.item() == np.float16(1.1)
    x = torch.tensor([[1.1, 1.9, 4.1, 0.0]])
    d, m = qparams.scale.item(), qparams.offset.item()
    assert quantize(x, qparams, spec).tolist() == [[0, 4, 15, 0]]
    assert fake_quantize(x, qparams, spec).tolist() == [[np.float32(q * d + m) for q in (0, 4, 15, 0)]]


def test_min_max_of_one_value_is_that_value() -> None:
    x = torch.full((1, 4), 1.25)
    for grid in (UINT4, INT4, E2M1):
        spec = spec_of(grid, "min-max")
        qparams = qparams_of(x, spec)
        assert qparams.scale.item() == 1.0
        assert torch.equal(fake_quantize(x, qparams, spec), x)


def test_mean_is_paretoqs_start_of_one_bit() -> None:
    x = torch.randn(4, 32)
    x[2] = 0.0
    qparams = qparams_of(x, spec_of(BINARY, "mean", granularity=per_channel))
    expected = torch.where(x.abs().amax(1) == 0, 1.0, x.abs().mean(1))[:, None]
    torch.testing.assert_close(qparams.scale, expected, rtol=2.0**-22, atol=0)


def test_pow2_is_the_smallest_power_of_two_that_does_not_clip() -> None:
    for amax in (torch.rand(50) * 2.0 ** torch.randint(-20, 20, (50,))).tolist():
        scale = Fraction(scale_of(-amax, 0.0, spec_of(INT8, "pow2")).scale.item())
        assert scale.numerator == 1 or scale.denominator == 1
        assert math.log2(scale).is_integer()
        assert scale / 2 < Fraction(amax) / 127 <= scale


# --- MX -------------------------------------------------------------------------------------------------

# OCP Microscaling v1.0, tables 3 to 6: exponent of the largest power of two, mantissa bits, largest value
MX_ELEMENTS = [
    (E2M1, 2, 1, 6),
    (E2M3, 2, 3, Fraction(15, 2)),
    (E3M2, 4, 2, 28),
    (E4M3, 8, 3, 448),
    (E5M2, 15, 2, 57344),
    (MXINT8, 0, 6, Fraction(127, 64)),
]
MX_RULES: tuple[ScaleRule, ...] = ("floor", "even", "ceil", "rceil")


def exponent_of(amax: Fraction, rule: str, emax: int, mantissa_bits: int, largest: Fraction) -> int:
    """The scale's exponent in rational arithmetic, each rule as its source words it."""

    floor_log2 = math.frexp(amax)[1] - 1
    match rule:
        case "floor":  # "the largest power of two at most amax, over that of the element format"
            e = floor_log2 - emax
        case "even":  # torchao: round amax to the element's mantissa, half up, then take the floor
            step = Fraction(2) ** (floor_log2 - mantissa_bits)
            rounded = math.floor(amax / step + Fraction(1, 2)) * step
            e = floor_log2 + (rounded >= Fraction(2) ** (floor_log2 + 1)) - emax
        case "ceil":  # torchao: ceil(log2(amax)) - emax
            e = floor_log2 + (amax > Fraction(2) ** floor_log2) - emax
        case _:  # "rceil", NVIDIA: the least scale with which nothing saturates
            e = floor_log2 - emax
            while Fraction(2) ** e * largest < amax:
                e += 1
    return min(max(e, -127), 127)


def mantissas() -> list[float]:
    thresholds = [1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 2.0]
    ulp = 2.0**-23
    near = [m + k * ulp for m in thresholds for k in (-2, -1, 0, 1, 2)]
    return [m for m in near if 1 <= m < 2]


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("element", MX_ELEMENTS, ids=lambda row: row[0].name)
def test_mx_exponents(element: tuple[FloatFormat | FixedFormat, int, int, Fraction], rule: ScaleRule) -> None:
    grid, *facts = element
    exponents = (-149, -130, -127, -126, -125, -124, -118, -112, -111, 0, 60, 127)
    amaxes = np.array([m * 2.0**k for m in mantissas() for k in exponents]).astype(np.float32)
    amaxes = torch.tensor(amaxes[(amaxes > 0) & np.isfinite(amaxes)])[:, None]
    spec = spec_of(grid, rule, granularity=per_channel, scale_format=E8M0)
    codes = E8M0.encode(choose_qparams(-amaxes, amaxes / 2, spec).scale)
    oracle = [exponent_of(Fraction(amax), rule, *facts) + 127 for amax in amaxes[:, 0].tolist()]
    assert codes[:, 0].tolist() == oracle


def test_mx_thresholds_by_hand() -> None:
    # amax in units of a binade, fp4 (emax 2): the exponents that floor, even, ceil, rceil choose.
    for amax, expected in [
        (4.0, [0, 0, 0, 0]),
        (4.5, [0, 0, 1, 0]),
        (6.0, [0, 0, 1, 0]),
        (6.5, [0, 0, 1, 1]),
        (7.0, [0, 1, 1, 1]),
        (7.5, [0, 1, 1, 1]),
    ]:
        found = [
            math.log2(scale_of(-amax, 0.0, spec_of(E2M1, rule, scale_format=E8M0)).scale.item())
            for rule in MX_RULES
        ]
        assert found == expected


@pytest.mark.parametrize("rule", MX_RULES)
def test_mx_elements_against_gfloat_free_reference(rule: ScaleRule) -> None:
    """Whole MX blocks: exponent from rational arithmetic, elements from ml_dtypes."""
    x = sample()
    for grid, dtype, *facts in (
        (E2M1, ml_dtypes.float4_e2m1fn, 2, 1, Fraction(6)),
        (E4M3, ml_dtypes.float8_e4m3fn, 8, 3, Fraction(448)),
    ):
        spec = spec_of(grid, rule, granularity=per_group(32), scale_format=E8M0)
        blocks = x.numpy().reshape(-1, 32)
        codes = quantize(x, qparams_of(x, spec), spec).numpy().reshape(-1, 32)
        for block, code in zip(blocks, codes, strict=True):
            amax = Fraction(float(np.abs(block).max()))
            scale = np.float32(2.0 ** exponent_of(amax, rule, *facts)) if amax else np.float32(1)
            oracle = (block / scale).clip(grid.lo, grid.hi).astype(dtype).view(np.uint8)
            np.testing.assert_array_equal(code, oracle)


# --- NVFP4 ----------------------------------------------------------------------------------------------


def nvfp4(x: np.ndarray) -> tuple[np.float32, np.ndarray, np.ndarray]:
    """Global scale, block scales and codes: numpy and ml_dtypes, all in float32; ModelOpt's floor of 2^-9."""
    f = np.float32
    whole = np.abs(x).max() / f(6 * 448)
    blocks = x.reshape(x.shape[0], -1, 16)
    amax = np.abs(blocks).max(-1)
    scale = (amax / f(6) / whole).clip(f(2**-9), f(448)).astype(ml_dtypes.float8_e4m3fn).astype(f)
    scale[amax == 0] = 1
    q = (blocks / (scale * whole)[..., None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    return whole, scale, q.view(np.uint8).reshape(x.shape)


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e3, 3e5], ids=str)
def test_nvfp4_against_numpy(outlier: float) -> None:
    for _ in range(10):
        x = torch.randn(32, 128) * torch.rand(32, 1)
        x[3, 5] = outlier
        x[4, :32] = 0.0
        x[5, :16] *= 1e-4
        whole, scale, codes = nvfp4(x.numpy())
        qparams = qparams_of(x, NVFP4)
        assert qparams.global_scale.item() == whole
        np.testing.assert_array_equal(qparams.scale.numpy(), scale)
        np.testing.assert_array_equal(quantize(x, qparams, NVFP4).numpy(), codes)


def test_nvfp4_by_hand() -> None:
    # One block at the tensor's maximum: its scale is 448, so that 448 * global * 6 is the maximum again.
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 1.0
    qparams = qparams_of(x, NVFP4)
    assert qparams.global_scale.item() == 1.0
    assert qparams.scale.tolist() == [[448.0, 0.171875]]  # 1 / 6 on E4M3's grid
    assert quantize(x, qparams, NVFP4)[0, [0, 1, 16]].tolist() == [7, 0, 7]


def test_a_calibrated_global_scale_is_used() -> None:
    x = sample()
    whole = choose_global_scale(torch.tensor(1000.0), NVFP4)
    assert whole.item() == np.float32(1000) / np.float32(2688)
    qparams = qparams_of(x, NVFP4, whole)
    assert qparams.global_scale is whole
    amax = x.reshape(8, -1, 16).abs().amax(-1)
    oracle = (amax / 6 / whole).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(qparams.scale, torch.where(amax == 0, 1.0, oracle))
    assert choose_global_scale(torch.tensor(1.0), spec_of(INT4, "narrow")) is None


# --- what every scale promises ---------------------------------------------------------------------------

SCALE_FORMATS = (FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2, E8M0, FloatFormat(5, 3, specials="ieee"))


@over("grid", SCALE_FORMATS)
def test_storable_is_on_the_grid_and_never_zero(grid: FloatFormat | PowerOfTwo) -> None:
    magnitudes = 2.0 ** torch.arange(-149, 128).float() * 1.37
    edges = torch.tensor([0.0, 1e-45, 1e-38, grid.floor, grid.hi, 3e38])
    scale = torch.cat([magnitudes, edges])[None]
    scale = torch.cat([scale, -scale])
    stored = storable(scale, grid)
    assert (stored != 0).all()
    assert (stored.abs() >= grid.floor).all()
    assert stored.isfinite().all()
    if isinstance(grid, PowerOfTwo):  # without a sign, its smallest value is the nearest to a negative scale
        assert (stored[scale < 0] == grid.lo).all()
        scale, stored = scale[scale >= 0][None], stored[scale >= 0][None]
    assert torch.equal(stored.sign(), torch.where(scale == 0, 1.0, scale.sign()))
    assert torch.equal(grid.rint(stored), stored)
    assert torch.equal(storable(stored, grid), stored)
    inside = (scale.abs() >= grid.floor) & (scale.abs() <= grid.hi)
    assert torch.equal(stored[inside], grid.rint(scale).clamp(grid.lo, grid.hi)[inside])


@over("spec", SPECS)
def test_scales_lie_on_their_format(spec: QuantSpec) -> None:
    qparams = qparams_of(sample(), spec)
    assert qparams.scale.shape == spec.granularity.scale_shape(8, 64)
    np.testing.assert_array_equal(bits(spec.scale_format.rint(qparams.scale)), bits(qparams.scale))
    assert (qparams.scale != 0).all()
    assert (qparams.step != 0).all()
    assert (qparams.zero_point is not None) == spec.has_zero_point
    assert (qparams.offset is not None) == spec.has_offset
    if qparams.offset is not None:
        np.testing.assert_array_equal(bits(spec.scale_format.rint(qparams.offset)), bits(qparams.offset))
    if qparams.zero_point is not None:
        assert qparams.zero_point.dtype == torch.int32
        assert qparams.zero_point.min() >= spec.format.lo
        assert qparams.zero_point.max() <= spec.format.hi


@over("spec", SPECS)
def test_zero_is_exact(spec: QuantSpec) -> None:
    x = sample()
    x[:, ::4] = 0.0
    qparams = qparams_of(x, spec)
    if spec.keeps_zero:
        assert (dequantize(quantize(x, qparams, spec), qparams, spec)[:, ::4] == 0).all()
    nothing = torch.zeros(8, 64)
    qparams = qparams_of(nothing, spec)
    assert torch.equal(qparams.scale, torch.ones_like(qparams.scale))
    found = fake_quantize(nothing, qparams, spec)
    assert (found.abs() == (0 if spec.format.has_zero else spec.format.floor)).all()


@over("spec", SPECS)
def test_tiny_blocks_are_finite_and_keep_their_zeros(spec: QuantSpec) -> None:
    for magnitude in (1e-44, 1e-38):
        x = torch.randn(8, 64) * magnitude
        x[:, ::4] = 0.0
        y = fake_quantize(x, qparams_of(x, spec), spec)
        assert y.isfinite().all()
        assert (y[:, ::4] == 0).all() or not spec.keeps_zero


def test_tiny_block_beside_a_huge_one_takes_the_floor() -> None:
    x = torch.cat([torch.full((1, 16), 3e5), torch.full((1, 16), 1e-3)], dim=1)
    x[0, 20] = 0.0
    qparams = qparams_of(x, NVFP4)
    assert qparams.scale.tolist() == [[448.0, 2.0**-9]]
    assert fake_quantize(x, qparams, NVFP4)[0, 16:].count_nonzero() == 0


def test_float16_scales_do_not_underflow() -> None:
    spec = spec_of(INT4, "narrow", scale_format=FLOAT16)
    assert scale_of(-1e-9, 1e-9, spec).scale.item() == 2.0**-24  # float16's smallest subnormal
    assert scale_of(-1e9, 1e9, spec).scale.item() == 65504.0
    assert scale_of(-1.0, 1.0, spec).scale.item() == np.float16(np.float32(1) / np.float32(7))


def test_signed_max_puts_the_largest_value_on_the_lowest_code() -> None:
    spec = spec_of(INT4, "signed-max", granularity=per_channel, scale_format=FLOAT16)
    x = torch.tensor([[8.0, -3.0, 1.0, 0.0], [-8.0, 3.0, 1.0, 0.0]])
    qparams = qparams_of(x, spec)
    assert qparams.scale.tolist() == [[-1.0], [1.0]]
    assert quantize(x, qparams, spec).tolist() == [[-8, 3, -1, 0], [-8, 3, 1, 0]]
    assert torch.equal(fake_quantize(x, qparams, spec), x)
