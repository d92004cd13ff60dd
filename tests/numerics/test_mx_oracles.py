"""MX blocks against torchao, which has all four scale rules, and gfloat, which has the specification's.

Scales and element codes are compared, on blocks whose largest value lies at every edge of a binade and whose
other values are every code point, and on random tensors. Where torchao deviates, the blocks concerned are
computed from what its source does, and nothing else may differ.
"""

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as known
from torch import Tensor
from torchao.prototype.mx_formats import mx_tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4

from recoup.numerics import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    MXINT8,
    FixedFormat,
    FloatFormat,
    QParams,
    QuantSpec,
    ScaleRule,
    dequantize,
    per_group,
    qparams_of,
    quantize,
    storable,
)

from .inputs import DTYPES, blocks, drawn, mantissas
from .tables import bits, over

ELEMENTS = {
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    E2M3: mx_tensor.DTYPE_FP6_E2M3,
    E3M2: mx_tensor.DTYPE_FP6_E3M2,
    E2M1: torch.float4_e2m1fn_x2,
}
RULES: tuple[ScaleRule, ...] = ("floor", "even", "ceil", "rceil")
every_element = over("grid", ELEMENTS)
every_rule = pytest.mark.parametrize("rule", RULES)


def spec_of(grid: FloatFormat | FixedFormat, rule: ScaleRule) -> QuantSpec:
    return QuantSpec(
        format=grid, granularity=per_group(32), scale_rule=rule, scale_format=E8M0, ranges="dynamic"
    )


def torchao(x: Tensor, grid: FloatFormat, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Scale and element codes; it refuses float16, whose values float32 holds."""
    x = x.float() if x.dtype == torch.float16 else x
    scales, codes = mx_tensor.to_mx(x, ELEMENTS[grid], 32, ScaleCalculationMode(rule))
    codes = unpack_uint4(codes) if grid == E2M1 else codes.view(torch.uint8)
    return scales.view(torch.uint8), codes


def ours(x: Tensor, grid: FloatFormat, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    spec = spec_of(grid, rule)
    qparams = qparams_of(x, spec)
    return E8M0.encode(qparams.scale), quantize(x, qparams, spec)


def per_block(differs: Tensor) -> Tensor:
    """Whether anything in a block of 32 differs."""
    return differs.unflatten(1, (-1, 32)).any(2)


def amax_of(x: Tensor) -> Tensor:
    return x.float().abs().unflatten(1, (-1, 32)).amax(2)


def rceil_by_logarithm(x: Tensor, grid: FloatFormat) -> Tensor:
    """torchao 0.18, mx_tensor.py lines 133 and 176: ceil(log2(amax / hi)) in float32, as a scale code."""
    return (torch.ceil(torch.log2(amax_of(x) / grid.hi)).clamp(-127, 127) + 127).to(torch.uint8)


def edges() -> Tensor:
    """Blocks with their largest value near every threshold in every binade of float32, subnormal ones too."""
    amax = torch.cat([mantissas().double() * 2.0**k for k in range(-149, 128)]).float()
    amax = amax[(amax > 0) & amax.isfinite()]
    x = torch.zeros(len(amax), 32)
    x[:, 0], x[:, 1], x[:, 2:] = -amax, amax / 2, amax[:, None] * torch.rand(30)
    return x


@every_rule
@every_element
def test_torchao_at_every_code_point(grid: FloatFormat, rule: ScaleRule) -> None:
    x = blocks(grid, 32)
    for dtype in (torch.float32, torch.bfloat16):
        same(x.to(dtype), grid, rule)


@every_rule
@every_element
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchao_on_random_tensors(grid: FloatFormat, rule: ScaleRule, dtype: torch.dtype) -> None:
    same(drawn(dtype), grid, rule)


def same(x: Tensor, grid: FloatFormat, rule: ScaleRule) -> None:
    scales, codes = torchao(x, grid, rule)
    own_scales, own_codes = ours(x, grid, rule)
    wrong = scales != own_scales
    if rule == "rceil":
        assert torch.equal(scales, rceil_by_logarithm(x, grid))
        above = amax_of(x) / E8M0.decode(own_scales - 1) / grid.hi
        assert torch.equal(wrong, (above > 1) & (scales < own_scales))
        assert (above <= 1 + 22 * 2.0**-23)[wrong].all()
    else:
        assert not wrong.any()
    assert not (per_block(codes != own_codes) & ~wrong).any()


@every_element
def test_torchaos_rceil_rounds_down_where_its_logarithm_does(grid: FloatFormat) -> None:
    """An amax up to 22 ulps above hi * 2^k: log2 in float32 is k, so the scale is half ours and saturates."""
    ulps, exponents = torch.arange(41), torch.arange(-100, 101)
    amax = (grid.hi * (1 + ulps * 2.0**-23).double() * 2.0 ** exponents[:, None].double()).float()
    x = torch.zeros(amax.numel(), 32)
    x[:, 0] = amax.flatten()
    scales, _ = torchao(x, grid, "rceil")
    own_scales, _ = ours(x, grid, "rceil")
    wrong = scales != own_scales
    assert torch.equal(scales, rceil_by_logarithm(x, grid))
    assert torch.equal(scales[wrong] + 1, own_scales[wrong])
    assert (amax.flatten()[:, None] / E8M0.decode(scales) > grid.hi)[wrong].all()
    # Half an ulp of k, |k| in [2^j, 2^(j + 1)), is 2^(j - 24); log2(1 + d) is d / ln 2.
    wrong = wrong.reshape(amax.shape)
    assert not wrong[:, 23:].any()
    assert not wrong[:, 0].any()
    assert not wrong[exponents.abs() < 4].any()
    assert wrong[exponents.abs() > 64, 1:12].all()


@every_rule
@every_element
def test_torchao_divides_by_another_number_where_the_scale_is_its_smallest(
    grid: FloatFormat, rule: ScaleRule
) -> None:
    """Stored is 2^-127, divided by 2^-126 (mx_tensor.py line 359), and in RCEIL by nothing (line 199)."""
    x = edges()
    scales, codes = torchao(x, grid, rule)
    own_scales, own_codes = ours(x, grid, rule)
    smallest = (scales == 0)[:, 0]
    differs = per_block(codes != own_codes)[:, 0]
    assert not (differs & ~smallest & (scales == own_scales)[:, 0]).any()
    divisor = torch.full_like(amax_of(x), 1.0 if rule == "rceil" else 2.0**-126)
    theirs = quantize(x, QParams(scale=divisor), spec_of(grid, rule))
    assert torch.equal(codes[smallest], theirs[smallest])
    assert (differs & smallest).any()


@every_rule
@every_element
def test_torchao_decodes_our_codes_to_the_same_values(grid: FloatFormat, rule: ScaleRule) -> None:
    x = blocks(grid, 32, exponents=(-20, 13))
    spec = spec_of(grid, rule)
    qparams = qparams_of(x, spec)
    codes, scales = quantize(x, qparams, spec), E8M0.encode(qparams.scale)
    stored = codes[:, ::2] | codes[:, 1::2] << 4 if grid == E2M1 else codes
    stored = stored.view(ELEMENTS[grid]) if grid in (E4M3, E5M2) else stored
    values = mx_tensor.to_dtype(stored, scales.view(torch.float8_e8m0fnu), ELEMENTS[grid], 32, torch.float32)
    np.testing.assert_array_equal(bits(values), bits(dequantize(codes, qparams, spec)))


@every_rule
def test_a_block_of_zeros_has_scale_1_here_and_the_smallest_in_torchao(rule: ScaleRule) -> None:
    x = torch.cat([torch.zeros(1, 32), torch.full((1, 32), -0.0)])
    scales, codes = torchao(x, E2M1, rule)
    own_scales, own_codes = ours(x, E2M1, rule)
    assert (scales.tolist(), own_scales.tolist()) == ([[0], [0]], [[127], [127]])
    assert torch.equal(codes, own_codes)


@pytest.mark.parametrize(("rule", "infinite"), [("floor", 253), ("even", 253), ("ceil", 253), ("rceil", 254)])
def test_torchao_stores_nan_as_255_and_infinity_as_a_number(rule: ScaleRule, infinite: int) -> None:
    """The specification wants NaN for both; here both are an error before any scale."""
    x = torch.ones(2, 32)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    scales, _ = torchao(x, E2M1, rule)
    assert scales.tolist() == [[255], [infinite]]


GFLOAT = {
    E2M1: known.format_info_mxfp4_e2m1,
    E2M3: known.format_info_mxfp6_e2m3,
    E3M2: known.format_info_mxfp6_e3m2,
    E4M3: known.format_info_mxfp8_e4m3,
    E5M2: known.format_info_mxfp8_e5m2,
    MXINT8: known.format_info_mxint8,
}


@over("grid", GFLOAT)
def test_gfloats_blocks(grid: FloatFormat | FixedFormat) -> None:
    """The specification's floor, MXINT8 too; in float64, so no rounding of a logarithm is in the way."""
    x = torch.cat([blocks(grid, 32, exponents=(3,))[::23], drawn(torch.float32, 8, 256).reshape(-1, 32)])
    spec = spec_of(grid, "floor")
    qparams = qparams_of(x, spec)
    oracle = [
        gfloat.quantize_block(GFLOAT[grid], block, gfloat.compute_scale_amax) for block in x.double().numpy()
    ]
    values = dequantize(quantize(x, qparams, spec), qparams, spec)
    np.testing.assert_array_equal(values.numpy(), np.array(oracle, np.float32))


def test_e8m0_is_torchs_cast_but_at_both_ends() -> None:
    """It gives NaN from 1.5 * 2^127 on, and rounds all up that lies between 2^-127 and 2^-126."""
    powers = 2.0 ** torch.arange(-127, 128).double()
    every = torch.cat([powers, 1.5 * powers, 1.25 * powers, 1.75 * powers]).float()
    every = torch.cat([every, *(torch.nextafter(every, torch.tensor(end)) for end in (0.0, torch.inf))])
    codes = E8M0.encode(storable(every[None], E8M0))[0]
    theirs = every.to(torch.float8_e8m0fnu).view(torch.uint8)
    above, below = every >= 1.5 * 2.0**127, (every > 2.0**-127) & (every < 1.5 * 2.0**-127)
    assert torch.equal(codes != theirs, above | below)
    assert (theirs[above].tolist(), theirs[below].tolist()) == (
        [255] * int(above.sum()),
        [1] * int(below.sum()),
    )
