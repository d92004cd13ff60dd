"""From the values of a block to its scale: every convention the field has, by name.

They differ, and they are not interchangeable: weights trained under one rule and stored under another
lose several percent (RMS), so a preset carries the rule of the engine it ships to.

    half-range  amax / ((hi - lo) / 2)        torchao SYMMETRIC, compressed-tensors: amax / 7.5 for int4
    narrow      amax / hi                     TensorRT, GGUF Q8_0, FP8: amax / 127, amax / 448
    amax        amax                          ParetoQ, whose levels are fractions of the range
    no-clip     max(min / lo, max / hi)       torchao SYMMETRIC_NO_CLIPPING_ERR
    signed-max  (the value of largest |.|) / lo, so the scale may be negative      GGUF Q4_0, Q8_K
    affine      (max - min) / (hi - lo), with a zero point: the asymmetric rule
    min-max     the same of the raw extrema, with an offset in x's units           GGUF Q4_1
    pow2        2^ceil(log2(amax / hi))       fixed-point hardware
    floor, even, ceil, rceil                  the four ways to an MX scale; see `_binade`

Two ask for more than the extrema:

    mean           mean |x| / hi              ParetoQ's 1 bit
    four-over-six  amax / 6 or amax / 4, whichever errs less: see `VALUE_RULES`

An MX scale is 2^E. With amax = m 2^k, 1 <= m < 2, and hi = h 2^e, 1 <= h < 2, all of them start from
E = k - e, the floor of OCP Microscaling v1.0 (section 6.3), and add one when m passes a threshold.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from recoup.numerics.floats import power_of_two_below
from recoup.numerics.formats import Format

ScaleRule = Literal[
    "half-range",
    "narrow",
    "amax",
    "no-clip",
    "signed-max",
    "affine",
    "min-max",
    "pow2",
    "floor",
    "even",
    "ceil",
    "rceil",
    "mean",
    "four-over-six",
]
Block = Float[Tensor, "br bc"]
Rule = Callable[[Block, Block, Format], Block]
ValueRule = Callable[[Float[Tensor, "br rows bc columns"], Format], tuple[Block, ...]]


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


def _span(lo: Block, hi: Block, grid: Format) -> Block:
    return (hi - lo) / (grid.hi - grid.lo)


def _binade(raise_when: Callable[[Tensor, Format], Tensor]) -> Rule:
    """2^(k - e), doubled where `raise_when(m, grid)`."""

    def rule(lo: Block, hi: Block, grid: Format) -> Block:
        amax = _amax(lo, hi)
        unit = torch.where(amax < 2.0**-100, 2.0**-26, 1.0)  # subnormal numbers have no exponent to look at
        binade = power_of_two_below(amax / unit)
        mantissa = amax / unit / binade  # exact; NaN for a block of zeros, for which comparisons are false
        return binade / _exponent_part(grid) * unit * torch.where(raise_when(mantissa, grid), 2.0, 1.0)

    return rule


def _exponent_part(grid: Format) -> float:
    return float(power_of_two_below(torch.tensor(grid.hi)))


_no_saturation = _binade(lambda m, grid: m > grid.hi / _exponent_part(grid))

SCALE_RULES: Mapping[ScaleRule, Rule] = {
    "half-range": _half_range,
    "narrow": _narrow,
    "amax": lambda lo, hi, _: _amax(lo, hi),
    "no-clip": _no_clip,
    "signed-max": _signed_max,
    "affine": _span,
    "min-max": _span,
    "pow2": _no_saturation,
    "floor": _binade(lambda m, _: torch.zeros_like(m, dtype=torch.bool)),
    "even": _binade(lambda m, grid: m >= 2 - 2.0 ** -(grid.mantissa_bits + 1)),
    "ceil": _binade(lambda m, _: m > 1),
    "rceil": _no_saturation,
}
POWERS_OF_TWO: frozenset[ScaleRule] = frozenset({"pow2", "floor", "even", "ceil", "rceil"})


def _mean(magnitudes: Float[Tensor, "br rows bc columns"], grid: Format) -> tuple[Block, ...]:
    return (magnitudes.mean(dim=(1, 3)) / grid.hi,)


def _four_over_six(magnitudes: Float[Tensor, "br rows bc columns"], grid: Format) -> tuple[Block, ...]:
    to_six = magnitudes.amax(dim=(1, 3)) / grid.hi
    return to_six, to_six * 1.5


# Rules that look at |x| itself: the candidates for each block's scale. Of several, the one with the least sum
# of |error| wins, the first one a tie: Transformer Engine's choice for four-over-six (Cook et al. 2025,
# arXiv:2512.02010), common/cast/nvfp4/quantize_4over6_nvfp4.cuh and NVTE_NVFP4_4OVER6_ERR_MODE.
VALUE_RULES: Mapping[ScaleRule, ValueRule] = {"mean": _mean, "four-over-six": _four_over_six}

# The value of the scale format that the largest block's scale becomes under a global one, where it is not the
# largest: mapped to 4, that block's scale is half as large again. The same source.
LARGEST_SCALE: Mapping[ScaleRule, float] = {"four-over-six": 256.0}
