"""NF4 against torchao, whose table has four decimals: codes are equal where the tables decide alike."""

import pytest
import torch
from torch import Tensor
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, to_nf4

from recoup.numerics import dequantize, qparams_of, quantize
from recoup.schemes import preset

from .inputs import DTYPES, drawn

SPEC = preset("nf4").weights
LEVELS = SPEC.format.decode(torch.arange(16))


def by_torchao(x: Tensor, levels: Tensor) -> Tensor:
    """Its codes of blocks of 64, of whatever levels; the first of two is in the high half of a byte."""
    packed = NF4Tensor.convert_to_norm_float_weight(x.float(), x.numel() // 64, 64, levels)
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(x.shape)


def points() -> Tensor:
    """Blocks of 64 with 1 as their largest: levels, midpoints, and one float32 ulp to each side of each."""
    exact = torch.cat([LEVELS, (LEVELS[1:] + LEVELS[:-1]) / 2])
    near = [torch.nextafter(exact, torch.tensor(end)) for end in (-2.0, 2.0)]
    every = torch.cat([exact, *near]).clamp(-1, 1)
    rows = torch.cat([every, every.new_zeros(-len(every) % 63)]).reshape(-1, 63)
    return torch.cat([torch.ones(len(rows), 1), rows], dim=1)


def test_the_levels_are_torchaos_to_four_decimals() -> None:
    theirs = to_nf4(torch.randn(1, 16384), 64, 256).nf4
    assert torch.equal(torch.round(LEVELS.double(), decimals=4).float(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_torchaos_with_our_levels(dtype: torch.dtype) -> None:
    """A tie goes down in both; a midpoint that float32 rounded up is one for us, and above it for torchao."""
    for x in (points() * 0.7, drawn(dtype)):
        qparams = qparams_of(x, SPEC)
        position = (x.float().reshape(-1, 64) / qparams.scale.reshape(-1, 1)).reshape(x.shape)
        middles = (LEVELS[1:].double() + LEVELS[:-1].double()) / 2
        rounded_up = middles.float()[middles.float() > middles]
        differs = by_torchao(x, LEVELS) != quantize(x, qparams, SPEC)
        assert torch.equal(differs, torch.isin(position, rounded_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_decimals_move_what_is_between_two_midpoints(dtype: torch.dtype) -> None:
    """nf4_tensor.py lines 678 to 693: its midpoints are up to 5e-5 from ours."""
    x = drawn(dtype, 256, 256).float()
    theirs = torch.round(LEVELS.double(), decimals=4)
    qparams = qparams_of(x, SPEC)
    position = (x.reshape(-1, 64) / qparams.scale.reshape(-1, 1)).reshape(x.shape).double()
    ends = torch.stack([(table[1:] + table[:-1]) / 2 for table in (LEVELS.double(), theirs)])
    low, high = ends.amin(0), ends.amax(0)
    between = ((position[..., None] > low) & (position[..., None] <= high)).any(-1)
    differs = by_torchao(x, theirs.float()) != quantize(x, qparams, SPEC)
    assert not (differs & ~between).any()
    assert 0 < differs.float().mean() < 1e-3


def test_values_are_levels_times_the_largest_magnitude() -> None:
    x = drawn(torch.float32)
    qparams = qparams_of(x, SPEC)
    amax = x.reshape(-1, 64).abs().amax(1, keepdim=True)
    assert torch.equal(qparams.scale.reshape(-1, 1), amax)
    codes = quantize(x, qparams, SPEC)
    expected = (NF4Tensor.dequantize(codes.reshape(-1, 64).long(), LEVELS) * amax).reshape(x.shape)
    assert torch.equal(dequantize(codes, qparams, SPEC), expected)
