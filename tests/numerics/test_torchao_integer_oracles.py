"""Integers against torchao's primitives: equal scales and zero points; codes but for its reciprocal.

It computes x * (1 / s) where we divide (quant_primitives.py line 491), in the dtype of x.
"""

import pytest
import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from recoup.numerics import (
    Granularity,
    IntFormat,
    QParams,
    QuantSpec,
    ScaleRule,
    dequantize,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    qparams_of,
    quantize,
)

from .inputs import DTYPES, drawn
from .tables import INTS, over

RULES: dict[ScaleRule, MappingType] = {
    "half-range": MappingType.SYMMETRIC,
    "no-clip": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    "affine": MappingType.ASYMMETRIC,
}
BLOCKS: dict[Granularity, tuple[int, int]] = {
    per_tensor: (64, 256),
    per_channel: (1, 256),
    per_group(32): (1, 32),
    per_block(16, 64): (16, 64),
}


def spec_of(grid: IntFormat, rule: ScaleRule, granularity: Granularity) -> QuantSpec:
    return QuantSpec(format=grid, granularity=granularity, scale_rule=rule, ranges="dynamic")


SPECS = [
    spec_of(grid, rule, granularity)
    for grid in INTS
    for rule in RULES
    for granularity in BLOCKS
    if grid.signed or rule == "affine"
]


def torchao(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points."""
    grid, block = spec.format, BLOCKS[spec.granularity]
    dtype, ends = grid.code_dtype, {"quant_min": int(grid.lo), "quant_max": int(grid.hi)}
    rule = RULES[spec.scale_rule]
    scale, zero_point = choose_qparams_affine(x, rule, block, dtype, **ends, keepdim=True)
    return quantize_affine(x, block, scale, zero_point, dtype, **ends), scale, zero_point


def per_element(scale: Tensor, x: Tensor) -> Tensor:
    rows, columns = x.shape[0] // scale.shape[0], x.shape[1] // scale.shape[1]
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


@over("spec", SPECS)
def test_scales_zero_points_and_codes(spec: QuantSpec) -> None:
    grid = spec.format
    x = drawn(torch.float32)
    step = per_element(qparams_of(x, spec).scale, x)
    x[:, 1::2] = ((torch.floor(x / step) + 0.5) * step)[:, 1::2]  # as near to ties as float32 gets
    qparams = qparams_of(x, spec)
    codes, scale, zero_point = torchao(x, spec)
    assert torch.equal(scale, qparams.scale)
    if qparams.zero_point is not None:
        assert torch.equal(zero_point, qparams.zero_point)
    assert (zero_point == 0).all() or not spec.symmetric

    position, zero = x / per_element(scale, x), per_element(zero_point, x)
    multiplied = (torch.round(x * (1 / per_element(scale, x))) + zero).clamp(grid.lo, grid.hi)
    divided = (torch.round(position) + zero).clamp(grid.lo, grid.hi)
    ours = quantize(x, qparams, spec)
    assert torch.equal(codes != ours, multiplied != divided)
    assert ((position.frac().abs() - 0.5).abs() <= 2.0**-22 * position.abs())[codes != ours].all()
    ends = (int(grid.lo), int(grid.hi))
    values = dequantize_affine(ours, BLOCKS[spec.granularity], scale, zero_point, grid.code_dtype, *ends)
    assert torch.equal(values, dequantize(ours, qparams, spec))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_power_of_two_for_a_scale_nothing_differs(rule: ScaleRule, dtype: torch.dtype) -> None:
    """1 / s is exact then, in half precision too: every code and every tie of int4, with odd zero points."""
    grid = IntFormat(4)
    spec = spec_of(grid, rule, per_channel)
    ties = torch.arange(-30, 31) / 2
    for zero in (0,) if spec.symmetric else (-3, 0, 5):
        scale = 2.0 ** torch.arange(-6, 7)[:, None]
        x = (ties * scale).to(dtype)
        zeros = torch.full((13, 1), zero, dtype=torch.int32)
        codes = quantize_affine(x, (1, 61), scale.to(dtype), zeros, torch.int8, int(grid.lo), int(grid.hi))
        qparams = QParams(scale=scale, zero_point=None if spec.symmetric else zeros)
        assert torch.equal(codes, quantize(x, qparams, spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_it_decides_on_rounded_products(dtype: torch.dtype) -> None:
    spec = spec_of(IntFormat(8), "half-range", per_group(32))
    x = drawn(dtype)
    codes, scale, _ = torchao(x, spec)
    assert scale.dtype == dtype
    product = x * (1 / per_element(scale, x))
    assert torch.equal(codes, torch.round(product).clamp(-128, 127).to(torch.int8))
    exact = x.float() / per_element(scale, x).float()
    ours = quantize(x, QParams(scale=scale.float()), spec)
    moved = codes != ours
    reach = 1.5 * torch.finfo(dtype).eps * exact.abs()  # 1 / s and the product are rounded
    assert ((exact.frac().abs() - 0.5).abs() <= reach)[moved].all()
    assert moved.float().mean() > 0.003
