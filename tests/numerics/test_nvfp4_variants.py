"""NVFP4's variants: a block's largest value mapped to 6 or to 4, and weights in tiles of 16 x 16."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from recoup.numerics import (
    E2M1,
    E4M3,
    Granularity,
    QuantSpec,
    choose_global_scale,
    fake_quantize,
    per_block,
    per_channel,
    per_group,
    qparams_of,
    quantize,
)

from .tables import NVFP4

FOUR_OVER_SIX = QuantSpec(
    format=E2M1,
    granularity=per_group(16),
    scale_rule="four-over-six",
    scale_format=E4M3,
    global_scale=True,
    ranges="dynamic",
)


def four_over_six(blocks: np.ndarray, whole: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Scales and values of (blocks, elements): both candidates, in numpy and ml_dtypes; ties take the 6."""
    f, found = np.float32, []
    for to in (f(1), f(1.5)):
        amax = np.abs(blocks).max(1)
        scale = (amax / f(6) * to / whole).clip(f(2**-9), f(448)).astype(ml_dtypes.float8_e4m3fn).astype(f)
        scale[amax == 0] = 1
        step = (scale * whole)[:, None]
        values = (blocks / step).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(f) * step
        found.append((scale, values, np.abs(values.astype(np.float64) - blocks).sum(1)))
    four = found[1][2] < found[0][2]
    assert 0 < four.sum() < len(blocks)
    return np.where(four, found[1][0], found[0][0]), np.where(four[:, None], found[1][1], found[0][1])


@pytest.mark.parametrize("rows", [1, 16], ids=["1x16", "16x16"])
def test_four_over_six_against_numpy(rows: int) -> None:
    x = torch.randn(64, 128) * torch.rand(64, 1)
    x[:32] = torch.rand(32, 128)  # of large blocks, flat ones alone are better off with 4
    x[3, 5] = 30.0
    spec = replace(FOUR_OVER_SIX, granularity=per_block(rows, 16))
    whole = np.float32(np.abs(x.numpy()).max() / np.float32(6 * 256))
    blocks = x.numpy().reshape(64 // rows, rows, 8, 16).swapaxes(1, 2)
    scale, values = four_over_six(blocks.reshape(-1, rows * 16), whole)
    qparams = qparams_of(x, spec)
    assert qparams.global_scale.item() == whole
    np.testing.assert_array_equal(qparams.scale.numpy().reshape(-1), scale)
    values = values.reshape(blocks.shape).swapaxes(1, 2).reshape(x.shape)
    np.testing.assert_array_equal(fake_quantize(x, qparams, spec).numpy(), values)


def test_four_over_six_by_hand() -> None:
    # 4 is a value where the largest becomes 4, and between 3 and 4.5 or so where it becomes 6.
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 1:3] = 1536.0, torch.tensor([768.0, 512.0])  # 6, 3, 2 with scale 256: no error
    x[0, 16:18] = torch.tensor([4.0, 3.0])  # to 6: 6 and 4.5, which has no code; to 4: both
    qparams = qparams_of(x, FOUR_OVER_SIX)
    assert qparams.global_scale.item() == 1.0
    assert qparams.scale.tolist() == [[256.0, 1.0, 1.0]]
    assert torch.equal(fake_quantize(x, qparams, FOUR_OVER_SIX), x)


def test_four_over_six_errs_no_more_than_six_alone() -> None:
    x = torch.randn(64, 256)
    whole = choose_global_scale(x.abs().max(), FOUR_OVER_SIX)
    six = replace(FOUR_OVER_SIX, scale_rule="narrow")
    errors = [
        (fake_quantize(x, qparams_of(x, spec, whole), spec) - x).abs().reshape(-1, 16).sum(1)
        for spec in (FOUR_OVER_SIX, six)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()


@pytest.mark.parametrize("granularity", [per_group(16), per_block(16, 16)], ids=str)
def test_nvfp4_blocks_of_two_dimensions(granularity: Granularity) -> None:
    """A 16 x 16 tile is one block: its codes are those of its 256 values in a row, and of its transpose."""
    x = torch.randn(32, 64)
    spec = replace(NVFP4, granularity=granularity)
    qparams = qparams_of(x, spec)
    assert qparams.scale.shape == (32 // (granularity.rows or 1), 4)
    codes = quantize(x, qparams, spec)
    if granularity.rows == 16:
        turned = qparams_of(x.T.contiguous(), spec)
        assert torch.equal(turned.scale, qparams.scale.T)
        assert torch.equal(quantize(x.T.contiguous(), turned, spec), codes.T)
    tile = x[:16, 16:32] if granularity.rows == 16 else x[:1, 16:32]
    flat = tile.reshape(1, -1)
    alone = qparams_of(flat, replace(spec, granularity=per_channel), qparams.global_scale)
    assert alone.scale.item() == qparams.scale[0, 1]
    found = quantize(flat, alone, replace(spec, granularity=per_channel))
    assert torch.equal(found, codes[: len(tile), 16:32].reshape(1, -1))
