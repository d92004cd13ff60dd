"""From the extrema of a block to its scale: every convention the field has, by name.

They differ, and they are not interchangeable: weights trained under one rule and stored under another
lose several percent (RMS), so a preset carries the rule of the engine it ships to.

    half-range  amax / ((hi - lo) / 2)        torchao SYMMETRIC, compressed-tensors: amax / 7.5 for int4
    narrow      amax / hi                     TensorRT, GGUF Q8_0, FP8: amax / 127, amax / 448
    no-clip     max(min / lo, max / hi)       torchao SYMMETRIC_NO_CLIPPING_ERR
    signed-max  (the value of largest |.|) / lo, so the scale may be negative      GGUF Q4_0
    affine      (max - min) / (hi - lo), with a zero point: the asymmetric rule
    pow2        2^ceil(log2(amax / hi))       fixed-point hardware
    floor, even, ceil, rceil                  the four ways to an MX scale; see `_binade`

An MX scale is 2^E. With amax = m 2^k, 1 <= m < 2, and hi = h 2^e, 1 <= h < 2, all of them start from
E = k - e, the floor of OCP Microscaling v1.0 (section 6.3), and add one when m passes a threshold.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from recoup.numerics.formats import Format, power_of_two_below

ScaleRule = Literal[
    "half-range", "narrow", "no-clip", "signed-max", "affine", "pow2", "floor", "even", "ceil", "rceil"
]
Block = Float[Tensor, "br bc"]
Rule = Callable[[Block, Block, Format], Block]


def _amax(lo: Block, hi: Block) -> Block:
    return torch.maximum(-lo, hi)


def _half_range(lo: Block, hi: Block, grid: Format) -> Block:
    return _amax(lo, hi) / ((grid.hi - grid.lo) / 2)


def _narrow(lo: Block, hi: Block, grid: Format) -> Block:
    return _amax(lo, hi) / grid.hi


def _no_clip(lo: Block, hi: Block, grid: Format) -> Block:
    return torch.maximum(lo / grid.lo, hi / grid.hi)


def _signed_max(lo: Block, hi: Block, grid: Format) -> Block:
    return torch.where(hi > -lo, hi, lo) / grid.lo


def _affine(lo: Block, hi: Block, grid: Format) -> Block:
    return (hi - lo) / (grid.hi - grid.lo)


def _binade(raise_when: Callable[[Tensor, Format], Tensor]) -> Rule:
    """2^(k - e), doubled where `raise_when(m, grid)`."""

    def rule(lo: Block, hi: Block, grid: Format) -> Block:
        amax = _amax(lo, hi)
        binade = power_of_two_below(amax)
        mantissa = amax / binade  # exact; NaN for a block of zeros, for which every comparison is false
        return binade / _exponent_part(grid) * torch.where(raise_when(mantissa, grid), 2.0, 1.0)

    return rule


def _exponent_part(grid: Format) -> float:
    return float(power_of_two_below(torch.tensor(grid.hi)))


_no_saturation = _binade(lambda m, grid: m > grid.hi / _exponent_part(grid))

SCALE_RULES: dict[ScaleRule, Rule] = {
    "half-range": _half_range,
    "narrow": _narrow,
    "no-clip": _no_clip,
    "signed-max": _signed_max,
    "affine": _affine,
    "pow2": _no_saturation,
    "floor": _binade(lambda m, _: torch.zeros_like(m, dtype=torch.bool)),
    "even": _binade(lambda m, grid: m >= 2 - 2.0 ** -(grid.mantissa_bits + 1)),
    "ceil": _binade(lambda m, _: m > 1),
    "rceil": _no_saturation,
}
