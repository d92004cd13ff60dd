"""Integers, FP8 and MX against compressed-tensors' own functions, which decide in the dtype of the weight.

In float32 scales, zero points and codes are equal, but where it adds the zero point before rounding. In half
precision the decisions that move are computed from its formula; nothing else may differ.
"""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor, MXFP6PackedCompressor, unpack_from_int32
from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from recoup.export import compressed_tensors as exporter
from recoup.export.compressed_tensors_config import PACKED
from recoup.numerics import (
    BFLOAT16,
    E2M1,
    E2M3,
    E4M3,
    E8M0,
    FLOAT16,
    FloatFormat,
    Granularity,
    IntFormat,
    QParams,
    QuantSpec,
    ScaleRule,
    dequantize,
    extrema,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    qparams_of,
    quantize,
)

from .inputs import DTYPES, blocks, drawn, points
from .tables import over

INTS = tuple(IntFormat(bits) for bits in range(2, 9))
every_int = over("grid", INTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half_dtypes = pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)], ids=str
)
STRATEGIES: dict[Granularity, dict[str, Any]] = {
    per_tensor: {"strategy": "tensor"},
    per_channel: {"strategy": "channel"},
    per_group(32): {"strategy": "group", "group_size": 32},
}


def spec_of(
    grid: IntFormat | FloatFormat, rule: ScaleRule, granularity: Granularity, **fields: Any
) -> QuantSpec:
    return QuantSpec(format=grid, granularity=granularity, scale_rule=rule, ranges="dynamic", **fields)


def args_of(grid: IntFormat | FloatFormat, **fields: Any) -> QuantizationArgs:
    kind = "int" if isinstance(grid, IntFormat) else "float"
    return QuantizationArgs(num_bits=grid.bits, type=kind, **{"symmetric": True, **fields})


def mx(grid: FloatFormat) -> QuantizationArgs:
    return args_of(grid, strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)


def their_qparams(x: Tensor, args: QuantizationArgs, granularity: Granularity) -> tuple[Tensor, Tensor]:
    lo, hi = extrema(x, granularity)  # exact in x's own dtype
    return calculate_qparams(lo.to(x.dtype), hi.to(x.dtype), args)


def per_element(scale: Tensor, x: Tensor) -> Tensor:
    rows, columns = x.shape[0] // scale.shape[0], x.shape[1] // scale.shape[1]
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def with_ties(x: Tensor, scale: Tensor) -> Tensor:
    """x, with every second value moved to the nearest tie between two codes."""
    step = per_element(scale, x)
    moved = (torch.floor(x / step) + 0.5) * step
    x = x.clone()
    x[:, 1::2] = moved[:, 1::2]
    return x


@every_int
@over("granularity", STRATEGIES)
@every_dtype
def test_symmetric_integers_in_float32(grid: IntFormat, granularity: Granularity, dtype: torch.dtype) -> None:
    args, spec = args_of(grid, **STRATEGIES[granularity]), spec_of(grid, "half-range", granularity)
    x = drawn(dtype).float()
    x = torch.cat([x, with_ties(x, torch.full((1, 1), 0.25))])
    scale, _ = their_qparams(x, args, granularity)
    qparams = qparams_of(x, spec)
    assert torch.equal(scale, qparams.scale)
    codes = their_quantize(x, scale, None, args, dtype=torch.int8)
    assert torch.equal(codes, quantize(x, qparams, spec))
    assert torch.equal(their_dequantize(codes, scale, None, args), dequantize(codes, qparams, spec))


@every_int
@over("granularity", [per_channel, per_group(32)])
def test_integers_with_a_zero_point_but_for_its_place(grid: IntFormat, granularity: Granularity) -> None:
    """It rounds x / s + z (forward_helpers.py lines 536 to 539), so ties differ where z is odd."""
    args = args_of(grid, symmetric=False, **STRATEGIES[granularity])
    spec = spec_of(grid, "affine", granularity)
    x = drawn(torch.float32)
    x = torch.cat([x, with_ties(x, qparams_of(x, spec).scale), torch.randint(-60, 61, x.shape) / 4])
    scale, zero_point = their_qparams(x, args, granularity)
    assert torch.equal(scale, qparams_of(x, spec).scale)
    codes = their_quantize(x, scale, zero_point, args, dtype=torch.int8)
    given = QParams(scale=scale, zero_point=zero_point.to(torch.int32))  # theirs: see the next test

    position, zero = x / per_element(scale, x), per_element(zero_point, x).float()
    before = torch.round((position + zero).clamp(grid.lo, grid.hi))
    after = (torch.round(position) + zero).clamp(grid.lo, grid.hi)
    assert torch.equal(codes != quantize(x, given, spec), before != after)
    assert torch.equal(codes, before.to(torch.int8))
    tie = (position.frac().abs() - 0.5).abs() <= 2.0**-24 * (position.abs() + zero.abs())
    assert tie[before != after].all()
    odd = (zero % 2 == 1) & (position.frac().abs() == 0.5)
    inside = (position + zero > grid.lo) & (position + zero < grid.hi)
    assert (before != after)[odd & inside].all()
    assert (odd & inside).any()


@every_int
def test_its_zero_point_is_rounded_after_the_subtraction(grid: IntFormat) -> None:
    """It rounds lo - min / s (helpers.py line 99), we min / s: float32 can drop what is just off a tie."""
    spec = spec_of(grid, "affine", per_channel)
    ratios = torch.arange(int(grid.hi) + 1) + 0.5
    ratios = torch.cat([ratios, *(torch.nextafter(ratios, torch.tensor(end)) for end in (0.0, 1e3))])
    edges = torch.stack([-ratios, grid.hi - grid.lo - ratios], dim=1)  # a scale of 1, as float32 has it
    x = torch.cat([edges, drawn(torch.float32, columns=2)])
    x = x[(x[:, 0] < 0) | (x[:, 1] > 0)]
    scale, zero_point = their_qparams(x, args_of(grid, symmetric=False, strategy="channel"), per_channel)
    qparams = qparams_of(x, spec)
    assert torch.equal(scale, qparams.scale)
    position = extrema(x, per_channel)[0].clamp(max=0) / qparams.scale
    theirs = torch.round((grid.lo - position).clamp(grid.lo, grid.hi))
    differs = theirs != (grid.lo - torch.round(position)).clamp(grid.lo, grid.hi)
    assert torch.equal(zero_point != qparams.zero_point, differs)
    assert 0 < differs.sum() < len(differs) / 4
    assert torch.equal((zero_point - qparams.zero_point)[differs].abs().unique(), torch.tensor([1]))


@every_int
@half_dtypes
def test_symmetric_scales_in_half_precision(grid: IntFormat, dtype: torch.dtype, stored: FloatFormat) -> None:
    """Derived in the weight's dtype: what ours are with that scale format."""
    spec = spec_of(grid, "half-range", per_group(32), scale_format=stored)
    x = drawn(dtype)
    scale, _ = their_qparams(x, args_of(grid, **STRATEGIES[per_group(32)]), per_group(32))
    assert scale.dtype == dtype
    assert torch.equal(scale.float(), qparams_of(x, spec).scale)


@every_int
@half_dtypes
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_codes_in_half_precision_are_decided_on_rounded_quotients(
    grid: IntFormat, dtype: torch.dtype, stored: FloatFormat, symmetric: bool
) -> None:
    """x / s is rounded to the weight's dtype, then to an integer (forward_helpers.py line 536)."""
    args = args_of(grid, symmetric=symmetric, **STRATEGIES[per_group(32)])
    x = drawn(dtype)
    scale, zero_point = their_qparams(x, args, per_group(32))
    codes = their_quantize(x, scale, None if symmetric else zero_point, args, dtype=torch.int8)
    spec = spec_of(grid, "half-range" if symmetric else "affine", per_group(32), scale_format=stored)
    given = QParams(scale=scale.float(), zero_point=None if symmetric else zero_point.to(torch.int32))
    ours = quantize(x, given, spec)

    position, zero = x.float() / per_element(scale, x).float(), per_element(zero_point, x).float()
    rounded = (position.to(dtype).float() + zero).to(dtype).float()
    theirs = torch.round(rounded.clamp(grid.lo, grid.hi)).to(torch.int8)
    assert torch.equal(codes, theirs)
    # A code moves only where the roundings reach a tie: half an ulp of the quotient, and one of the sum.
    reach = torch.finfo(dtype).eps / 2 * (2 * position.abs() + zero.abs() + 1)
    moved = codes != ours
    assert ((position.frac().abs() - 0.5).abs() <= reach)[moved].all()
    if grid.bits == 8:
        assert moved.float().mean() > 0.003


@over("grid", [E2M1, E2M3])
@every_dtype
def test_mx_is_the_rule_even(grid: FloatFormat, dtype: torch.dtype) -> None:
    spec = spec_of(grid, "even", per_group(32), scale_format=E8M0)
    every = blocks(grid, 32, exponents=(-8, 0, 11) if dtype == torch.float16 else (-20, 0, 13))
    for x in (every.to(dtype), drawn(dtype)):
        scale, _ = their_qparams(x, mx(grid), per_group(32))
        qparams = qparams_of(x, spec)
        assert torch.equal(scale.float(), qparams.scale)
        values = their_quantize(x, scale, None, mx(grid))
        assert torch.equal(values.float(), grid.decode(quantize(x, qparams, spec)))


def test_mx_scales_of_tiny_float16_blocks_are_1() -> None:
    """It reads the exponent off float16, and subnormals have none (mxfp_utils.py line 125)."""
    x = torch.tensor([2.0**-14, 1.5 * 2.0**-15, 1.4375 * 2.0**-15, 2.0**-20])[:, None].expand(4, 32)
    scale, _ = their_qparams(x.half(), mx(E4M3), per_group(32))
    assert scale[:, 0].tolist() == [2.0**-22, 2.0**-22, 1.0, 1.0]
    spec = spec_of(E4M3, "even", per_group(32), scale_format=E8M0)
    assert qparams_of(x.half(), spec).scale[:, 0].tolist() == [2.0**-22, 2.0**-23, 2.0**-23, 2.0**-28]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp8_takes_the_threshold_of_fp4(dtype: torch.dtype) -> None:
    """It rounds amax to one mantissa bit (mxfp_utils.py line 149): other scales for 1.75 <= m < 1.9375."""
    spec = spec_of(E4M3, "even", per_group(32), scale_format=E8M0)
    for x in (blocks(E4M3, 32).to(dtype), drawn(dtype)):
        scale, _ = their_qparams(x, mx(E4M3), per_group(32))
        qparams = qparams_of(x, spec)
        lo, hi = extrema(x, per_group(32))
        mantissa = 2 * torch.frexp(torch.maximum(-lo, hi)).mantissa
        early = (mantissa >= 1.75) & (mantissa < 1.9375)
        assert early.any()
        assert torch.equal(scale.float() != qparams.scale, early)
        assert torch.equal(scale.float()[early], 2 * qparams.scale[early])
        values = their_quantize(x, scale, None, mx(E4M3)).float()
        theirs = QParams(scale=scale.float())
        assert torch.equal(values, E4M3.decode(quantize(x, theirs, spec)))


@pytest.mark.parametrize(
    ("grid", "compressor"), [(E2M1, MXFP4PackedCompressor), (E2M3, MXFP6PackedCompressor)], ids=str
)
def test_the_bytes_of_its_mx_compressors_are_our_codes(grid: FloatFormat, compressor: Any) -> None:
    """Both nibbles of FP4, four FP6 codes in three bytes, and E8M0 scales; where x / s is not -0."""
    x = blocks(grid, 32)
    x[x.abs() < 1e-30] = 0.0
    spec = spec_of(grid, "even", per_group(32), scale_format=E8M0)
    qparams = qparams_of(x, spec)
    scheme = QuantizationScheme(targets=["Linear"], weights=mx(grid))
    stored = compressor.compress({"weight": x, "weight_scale": qparams.scale}, scheme)
    assert torch.equal(stored["weight_scale"], E8M0.encode(qparams.scale))
    codes, packed = quantize(x, qparams, spec), stored["weight_packed"]
    if grid == E2M1:
        assert torch.equal(packed, codes[:, ::2] | codes[:, 1::2] << 4)
    else:
        values = unpack_fp6_from_uint8(packed, *x.shape, dtype=torch.float32)
        assert torch.equal(values, grid.decode(codes))
        assert torch.equal(values.signbit(), codes >= 32)


@over("grid", [E2M1, E2M3, E4M3])
def test_a_negative_zero_loses_its_sign_in_its_e2m1_only(grid: FloatFormat) -> None:
    """It multiplies by the sign of x (fp4_utils.py line 97), which is 0 for -0; -0.1 keeps its sign."""
    args, x = mx(grid), torch.tensor([[-0.0, 0.0, -0.1, 0.1] * 8])
    values = their_quantize(x, torch.ones(1, 1), None, args)
    ours = quantize(
        x, QParams(scale=torch.ones(1, 1)), spec_of(grid, "even", per_group(32), scale_format=E8M0)
    )
    different = values.signbit() != grid.decode(ours).signbit()
    assert torch.equal(different, (x == 0) & x.signbit() & torch.tensor(grid == E2M1))


FP8 = {**STRATEGIES, per_block(16, 128): {"strategy": "block", "block_structure": [16, 128]}}


@over("granularity", FP8)
@every_dtype
def test_fp8_in_float32(granularity: Granularity, dtype: torch.dtype) -> None:
    args, spec = args_of(E4M3, **FP8[granularity]), spec_of(E4M3, "narrow", granularity)
    every = points(E4M3)
    every = torch.cat([every, every.new_zeros(-len(every) % 4096)]).reshape(-1, 256)
    for x in (drawn(dtype).float(), every.to(dtype).clamp(-480, 480).float()):
        scale, _ = their_qparams(x, args, granularity)
        qparams = qparams_of(x, spec)
        large = (
            qparams.scale > torch.finfo(torch.float32).smallest_normal
        )  # where ours are not at their floor
        large &= qparams.scale != 1  # nor of a block of zeros
        assert torch.equal(scale[large], qparams.scale[large])
        codes = their_quantize(x, qparams.scale, None, args, dtype=torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(codes, quantize(x, qparams, spec))


def test_a_block_of_zeros_has_scale_1_here_and_epsilon_there() -> None:
    x = torch.zeros(1, 32)
    for dtype in DTYPES:
        scale, _ = their_qparams(x.to(dtype), args_of(IntFormat(4), strategy="channel"), per_channel)
        assert scale.item() == torch.finfo(dtype).eps
    assert qparams_of(x, spec_of(IntFormat(4), "half-range", per_channel)).scale.item() == 1.0


@pytest.mark.parametrize("bits_", range(2, 9))
@pytest.mark.parametrize("columns", [32, 40, 96, 100])
def test_packed_by_the_exporter_and_unpacked(bits_: int, columns: int) -> None:
    """A dense stream: element i begins at bit i * b of its row, counted from -2^(b - 1)."""
    lo = -(2 ** (bits_ - 1))
    codes = torch.arange(7 * columns).remainder(2**bits_).add(lo).reshape(7, columns).to(torch.int8)
    codes = torch.cat([codes, torch.randint(lo, -lo, (5, columns), dtype=torch.int8)])
    spec = QuantSpec(
        format=IntFormat(bits_), granularity=per_channel, scale_rule="half-range", ranges="static"
    )
    stored = exporter._codes(codes, spec, PACKED)
    packed, shape = stored["weight_packed"], stored["weight_shape"]
    assert packed.shape == (12, -(-columns * bits_ // 32))
    assert torch.equal(unpack_from_int32(packed, bits_, torch.Size(shape.tolist())), codes)
    words = [sum((int(word) & 0xFFFFFFFF) << 32 * place for place, word in enumerate(row)) for row in packed]
    fields = [[(row >> bits_ * column) % 2**bits_ + lo for column in range(columns)] for row in words]
    assert codes.tolist() == fields
