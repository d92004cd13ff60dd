"""NVFP4 against torchao and compressed-tensors: block scales and element codes, equal but where they deviate.

Each deviation is one of three: the smallest block scale, the order in which scales are multiplied, and the
dtype in which a scale is derived. What it changes is computed here from the engine's formula, and the test
asserts differences there and nowhere else.
"""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale

from recoup import convert, prepare, resolve
from recoup.export import compressed_tensors as exporter
from recoup.numerics import (
    E2M1,
    E4M3,
    QParams,
    QuantSpec,
    dequantize,
    per_group,
    qparams_of,
    quantize,
)

from .inputs import DTYPES, blocks, drawn
from .tables import NVFP4, bits

ONE_LEVEL = QuantSpec(
    format=E2M1, granularity=per_group(16), scale_rule="narrow", scale_format=E4M3, ranges="dynamic"
)
SPECS = pytest.mark.parametrize("spec", [ONE_LEVEL, NVFP4], ids=["one-level", "two-level"])
FLOOR_OF_TORCHAO = 2.0**-6
ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    scale_dtype=torch.float8_e4m3fn,
    zp_dtype=torch.float8_e4m3fn,
)


def torchao(x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block scales and codes; it refuses float16, whose values float32 holds."""
    scales, packed = nvfp4_quantize(x.float() if x.dtype == torch.float16 else x, 16, global_scale)
    return scales.float(), unpack_uint4(packed)


def compressed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block scales, codes, and the global scale that compressed-tensors divides by."""
    lo, hi = x.unflatten(1, (-1, 16)).amin(2), x.unflatten(1, (-1, 16)).amax(2)
    divisor = generate_gparam(lo.amin().float(), hi.amax().float())
    scales, _ = calculate_qparams(lo, hi, ARGS, divisor)
    state = {"weight": x.clone(), "weight_scale": scales, "weight_global_scale": divisor}
    stored = NVFP4PackedCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=ARGS))
    return stored["weight_scale"].float(), unpack_uint4(stored["weight_packed"]), divisor


INPUTS: dict[str, Callable[[], Tensor]] = {
    **{f"points-2^{k}": partial(blocks, E2M1, 16, exponents=(k,)) for k in (-8, -4, 0, 3)},
    **{str(dtype): partial(drawn, dtype) for dtype in DTYPES},
}
every_input = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)


def ties(step: Tensor) -> Tensor:
    """Rows of 16 with given steps: 6 steps, then the ties of E2M1 as float32 has them, and one ulp beside."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.75, -2.5, -5.0, 0.0])
    x = torch.cat([torch.full((1,), 6.0), middles, torch.zeros(2)]) * step[:, None]
    infinity = torch.tensor(torch.inf)
    rows = [x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)]
    for row in rows:
        row[:, 0] = x[:, 0]
    return torch.cat(rows)


def per_element(scales: Tensor) -> Tensor:
    return scales.repeat_interleave(16, 1)


def e2m1(position: Tensor) -> np.ndarray:
    """Codes by ml_dtypes of x in units of its step."""
    return position.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def next_to_a_tie(position: Tensor) -> bool:
    """Every position is within two float32 ulps of a midpoint of E2M1."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    distance = (position.abs()[:, None] - middles).abs() / middles
    return bool((distance.amin(1) <= 4 * 2.0**-24).all())


@SPECS
@every_input
def test_torchao(spec: QuantSpec, make: Callable[[], Tensor]) -> None:
    """Its block scale is at least 2^-6 (nvfp4_tensor.py lines 816 and 838); it multiplies by 1 / step."""
    x = make()
    qparams = qparams_of(x, spec)
    scales, codes = torchao(x, qparams.global_scale)
    floored = (qparams.scale < FLOOR_OF_TORCHAO) | (x.float().unflatten(1, (-1, 16)) == 0).all(2)
    assert torch.equal(scales != qparams.scale, floored)
    assert (scales[floored] == FLOOR_OF_TORCHAO).all()

    whole = torch.tensor(1.0) if qparams.global_scale is None else qparams.global_scale
    multiplied = e2m1(x.float() * per_element((1 / whole) / scales))
    np.testing.assert_array_equal(codes.numpy(), multiplied)
    same = per_element(~floored)
    divided = e2m1(x.float() / per_element(qparams.step))
    ours = quantize(x, qparams, spec)
    assert torch.equal((codes != ours)[same], torch.tensor(multiplied != divided)[same])
    # And where its scale is another, its codes are ours with that scale, up to the same ties.
    theirs = quantize(x, QParams(scale=scales, global_scale=qparams.global_scale), spec)
    assert next_to_a_tie((x.float() / per_element(scales * whole))[theirs != codes])


@SPECS
def test_torchaos_reciprocal_moves_ties_and_nothing_else(spec: QuantSpec) -> None:
    step = E4M3.decode(torch.arange(0x20, 0x7F, dtype=torch.uint8)) * (0.37 if spec.global_scale else 1.0)
    x = ties(step)
    qparams = qparams_of(x, spec)
    scales, codes = torchao(x, qparams.global_scale)
    assert torch.equal(scales, qparams.scale)
    moved = quantize(x, qparams, spec) != codes
    assert 0.01 < moved.float().mean() < 0.3
    assert next_to_a_tie((x / per_element(qparams.step))[moved])


@every_input
def test_the_global_scale_is_torchaos_and_compressed_tensors_reciprocal(make: Callable[[], Tensor]) -> None:
    x = make()
    whole = qparams_of(x, NVFP4).global_scale
    assert whole is not None
    assert torch.equal(per_tensor_amax_to_scale(x.abs().amax()), whole)
    divisor = generate_gparam(x.amin().float(), x.amax().float())
    assert abs(divisor.double() * whole.double() - 1) <= 2.5 * 2.0**-24  # two roundings each way


@every_input
def test_torchao_decodes_our_codes_to_the_same_values(make: Callable[[], Tensor]) -> None:
    x = make()
    qparams = qparams_of(x, NVFP4)
    codes = quantize(x, qparams, NVFP4)
    packed, scales = codes[:, ::2] | codes[:, 1::2] << 4, qparams.scale.to(torch.float8_e4m3fn)
    stored = NVFP4Tensor(packed, scales, 16, torch.float32, qparams.global_scale)
    np.testing.assert_array_equal(bits(stored.dequantize()), bits(dequantize(codes, qparams, NVFP4)))


@every_input
def test_compressed_tensors(make: Callable[[], Tensor]) -> None:
    """Its scale is E4M3(448 * 6 / A * (a / 6)), in the dtype of the weight, and 0.125 where that is 0."""
    x = make()
    scales, codes, divisor = compressed(x)
    amax = x.abs().unflatten(1, (-1, 16)).amax(2)
    derived = (divisor * (amax / 6)).clamp(max=448)  # helpers.py lines 88 and 104: amax / 6 in x's dtype
    derived = derived.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    derived[derived == 0] = 0.125  # helpers.py line 381
    np.testing.assert_array_equal(scales.numpy(), derived)

    qparams = qparams_of(x, NVFP4)
    roundoff = 2.0**-22 + torch.finfo(x.dtype).eps / 2
    unrounded = amax.float() / 6 / qparams.global_scale
    tie = E4M3.rint(unrounded * (1 + roundoff)) != E4M3.rint(unrounded * (1 - roundoff))
    tiny = unrounded <= 2.0**-10 * (1 + roundoff)
    assert not ((scales != qparams.scale) & ~tie & ~tiny).any()

    same = per_element(scales == qparams.scale)
    position = x.float() / per_element(scales / divisor)  # forward_helpers.py lines 534 and 536
    negative_zero = (position == 0) & position.signbit()  # fp4_utils.py line 87: the sign of zero is 0
    theirs = e2m1(torch.where(negative_zero, 0.0, position))
    np.testing.assert_array_equal(codes.numpy(), theirs)
    ours = quantize(x, qparams, NVFP4)
    differs = (codes != ours) & same & ~negative_zero
    assert next_to_a_tie(position[differs])
    assert (ours == 8)[negative_zero].all()


def test_compressed_tensors_is_ours_where_the_global_scale_is_a_power_of_two() -> None:
    """Both orders of the scales are exact then: no code may differ, but that of -0."""
    for exponent in (-6, 0, 4):
        x = blocks(E2M1, 16, exponents=(3, 5, 8))
        x = x[x.abs().amax(1) <= 2688].clone()
        x[0] = 0.0
        x[0, 0] = 2688.0
        x *= 2.0**exponent
        x[x == 0] = 0.0
        qparams = qparams_of(x, NVFP4)
        scales, codes, divisor = compressed(x)
        assert 1 / divisor.item() == qparams.global_scale.item() == 2.0**exponent
        assert torch.equal(scales, qparams.scale)
        assert torch.equal(codes, quantize(x, qparams, NVFP4))


def test_smallest_block_scales_of_the_engines() -> None:
    """The tensor's largest value is 2688 and the global scale 1, so a block scale is a / 6."""
    amax = 6 * torch.tensor([2.0**-5, 2.0**-6, 2.0**-7, 2.0**-9, 2.0**-10, 2.0**-11, 0.0])
    x = torch.zeros(8, 16)
    x[:7, 0], x[7, 0] = amax, 2688.0
    assert qparams_of(x, NVFP4).scale[:7, 0].tolist() == [2.0**-5, 2.0**-6, 2.0**-7, *3 * [2.0**-9], 1.0]
    assert torchao(x, torch.tensor(1.0))[0][:7, 0].tolist() == [2.0**-5, *6 * [2.0**-6]]
    # Half of the smallest E4M3 value rounds to the even neighbour, zero, and zero becomes 0.125.
    expected = [2.0**-5, 2.0**-6, 2.0**-7, 2.0**-9, *3 * [0.125]]
    assert compressed(x)[0][:7, 0].tolist() == expected


# --- what the exporter writes -----------------------------------------------------------------------------


def test_the_exported_global_scale_is_a_divisor() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    module = convert(prepare(model, resolve(model, "nvfp4a16")))[0]
    weight = module.weight
    stored = exporter.stored(module)
    divisor = stored["weight_global_scale"]
    assert divisor.item() == 1 / weight.global_scale
    values = dequantize(weight.codes, weight.qparams, weight.spec)
    amax = values.abs().amax()
    assert abs(divisor * amax / (448 * 6) - 1) <= 2**-4  # amax was rounded to E2M1 * E4M3 meanwhile

    scheme = QuantizationScheme(targets=["Linear"], weights=ARGS)
    read = NVFP4PackedCompressor.decompress(dict(stored), scheme)["weight"]
    assert ((read.float() - values).abs() <= 2.0**-8 * values.abs()).all()  # it decompresses to bfloat16
    wrong = NVFP4PackedCompressor.decompress({**stored, "weight_global_scale": 1 / divisor}, scheme)["weight"]
    assert not torch.allclose(wrong.float(), values, rtol=0.5)


def test_a_divisor_read_back_as_a_multiplier_is_off_by_an_ulp_at_most() -> None:
    """1 / (1 / g) is g for mantissas below sqrt(2); above, some g are the reciprocal of no float32."""
    trained = (1 + torch.rand(512)) * 2.0 ** torch.randint(-24, 5, (512,))
    read = 1 / torch.stack([exporter._divisor(value) for value in trained])[:, 0]
    mantissa, exponent = torch.frexp(trained)
    off = read != trained
    assert torch.equal(off, torch.tensor([not has_reciprocal(value) for value in trained]))
    assert not off[2 * mantissa < 2**0.5].any()
    assert ((read - trained).abs() <= 2.0 ** (exponent - 24)).all()
    assert 1 / 8 < off.float().mean() < 1 / 4


def has_reciprocal(value: Tensor) -> bool:
    """Some float32 has this value as its reciprocal."""
    near = 1 / value
    ends = (torch.tensor(0.0), torch.tensor(torch.inf))
    return any(1 / d == value for d in (near, *(torch.nextafter(near, end) for end in ends)))
