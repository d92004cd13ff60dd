"""GGUF's MXFP4 against gguf's numpy quantizer: the specification's rule, by a logarithm in float32.

It differs where that logarithm is rounded up to a whole number, in ties, and in the sign of zero. bfloat16
stands here too: most converters pass tensors through it before they quantize.
"""

from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from recoup.numerics import (
    E2M1,
    E8M0,
    dequantize,
    fake_quantize,
    qparams_of,
    quantize,
)
from recoup.schemes import preset

from .inputs import DTYPES, blocks, drawn, mantissas

MXFP4 = replace(preset("mxfp4-gguf").weights, ranges="dynamic")


def mxfp4(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Element codes and scale codes of ggml, a block to a row."""
    rows = gguf.quantize(x.float().numpy(), GGMLQuantizationType.MXFP4).reshape(-1, 17)
    pairs = rows[:, 1:]
    return np.concatenate([pairs & 15, pairs >> 4], axis=1), rows[:, :1]


def by_logarithm(x: Tensor) -> np.ndarray:
    """ggml's scale code: floor(log2(amax)) - 2 + 127 with a float32 logarithm (gguf/quants.py line 674)."""
    amax = x.float().reshape(-1, 32).abs().amax(1, keepdim=True).numpy()
    with np.errstate(divide="ignore"):
        return np.where(amax > 0, np.floor(np.log2(amax)) - 2 + 127, 0).astype(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_rule_floor_with_ties_toward_zero(dtype: torch.dtype) -> None:
    for x in (blocks(E2M1, 32, exponents=(-8, 0, 11)).to(dtype), drawn(dtype)):
        codes, scales = mxfp4(x)
        qparams = qparams_of(x, MXFP4)
        own_scales = E8M0.encode(qparams.scale).reshape(-1, 1).numpy()
        np.testing.assert_array_equal(scales, by_logarithm(x))
        up = scales != own_scales
        amax = x.float().reshape(-1, 32).abs().amax(1, keepdim=True)
        mantissa = np.where(up, torch.frexp(amax).mantissa.numpy(), 1)
        assert (mantissa >= 1 - 22 * 2.0**-24).all()
        np.testing.assert_array_equal(scales[up], own_scales[up] + 1)

        position = (x.float().reshape(-1, 32) / qparams.scale.reshape(-1, 1)).numpy()
        ours = quantize(x, qparams, MXFP4).reshape(-1, 32).numpy()
        tie = np.isin(np.abs(position), [0.75, 1.75, 3.5])  # those whose even neighbour is the larger one
        zero = ours == 8  # ggml takes the first of its two zeros
        same = np.broadcast_to(~up, codes.shape)
        np.testing.assert_array_equal((codes != ours)[same], (tie | zero)[same])
        np.testing.assert_array_equal(codes[tie & same], ours[tie & same] - 1)
        assert (codes[zero] == 0).all()


def test_its_logarithm_rounds_up_below_a_power_of_two() -> None:
    """An amax up to 22 ulps below 2^k: log2 in float32 is k, the scale is twice ours, a binade is wasted."""
    powers = 2.0 ** torch.arange(-100, 101)
    x = torch.zeros(powers.numel() * 41, 32)
    x[:, 0] = (powers[:, None].double() * (1 - torch.arange(41) * 2.0**-24)).float().flatten()
    _, scales = mxfp4(x)
    own_scales = E8M0.encode(qparams_of(x, MXFP4).scale).numpy()
    np.testing.assert_array_equal(scales, by_logarithm(x))
    wrong = (scales != own_scales).reshape(-1, 41)
    np.testing.assert_array_equal(scales[wrong.flatten()], own_scales[wrong.flatten()] + 1)
    assert not wrong[:, 0].any()
    assert wrong[:30, 1:20].all()


def test_it_decodes_to_our_values_and_the_trained_lattice_passes_through() -> None:
    for x in (blocks(E2M1, 32), drawn(torch.float32), mantissas()[:, None].expand(-1, 32).contiguous()):
        qparams = qparams_of(x, MXFP4)
        codes = quantize(x, qparams, MXFP4)
        rows = codes.reshape(-1, 32)
        scale = E8M0.encode(qparams.scale).reshape(-1, 1)
        stored = torch.cat([scale, rows[:, :16] | rows[:, 16:] << 4], dim=1).numpy()
        values = gguf.dequantize(stored, GGMLQuantizationType.MXFP4).reshape(x.shape)
        np.testing.assert_array_equal(values, dequantize(codes, qparams, MXFP4).numpy())
        again, scales = mxfp4(fake_quantize(x, qparams, MXFP4))
        np.testing.assert_array_equal(scales, stored[:, :1])
        np.testing.assert_array_equal(again, np.where(codes == 8, 0, codes).reshape(-1, 32))


def test_bfloat16_tensors_are_rounded_as_ml_dtypes_does() -> None:
    """What a tensor passes through before it is quantized, in most converters."""
    x = torch.cat([drawn(torch.float32).flatten(), blocks(E2M1, 32).flatten()]).reshape(-1, 32)
    packed = gguf.quantize(x.numpy(), GGMLQuantizationType.BF16)
    np.testing.assert_array_equal(packed.view(ml_dtypes.bfloat16).astype(np.float32), x.bfloat16().float())
