"""How other tools lay codes and scales, and what they stand for: from bytes to float32.

    packed integers    compressed-tensors' pack-quantized: little-endian bit streams along rows, counted from
                       -2^(b - 1); zero points likewise, along columns
    integers           int8 codes as they are
    8-bit floats       E4M3; scales in float, or E8M0 as bytes; per tensor, row, block or group
    4-bit floats       two E2M1 to a byte, the first one low; scales in E4M3 under one of the tensor, or E8M0
    gptq               bit streams along columns of the transposed weight; g_idx names the group of every
                       input feature; zero points are stored less one, but for v2
    awq                eight codes to a word, in the order 0 2 4 6 1 3 5 7, of the transposed weight
    modelopt integers  two rows to a byte, the first one low, two's complement

The global scale of a 4-bit float is a divisor in compressed-tensors and a factor in ModelOpt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recoup.export.parity import Array
from recoup.numerics import E2M1, E8M0

PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("weight_global_scale", "weight_scale_2", "pre_quant_scale"),
    *("qweight", "qzeros", "scales", "g_idx"),
)
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the codes of eight columns lie in a word


class UnreadableError(ValueError):
    """Something that a checkpoint may say, and that is not understood here."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """How a weight is stored.

    Args:
        layout: a key of `LAYOUTS`.
        bits: of a code.
        block: rows and columns that share a scale, where the scales' own shape does not say it.
        zero_points_less_one: they are stored less one.
        divides_by_global: the scale of the scales is its reciprocal.
    """

    layout: str
    bits: int
    block: tuple[int | None, int | None] = (1, None)
    zero_points_less_one: bool = False
    divides_by_global: bool = False


Parts = Mapping[str, Tensor]


def _packed_integers(layer: Layer, parts: Parts) -> Tensor:
    rows, columns = (int(size) for size in parts["weight_shape"])
    middle = 2 ** (layer.bits - 1)
    if parts["weight_packed"].shape[1] != -(-columns * layer.bits // 32):
        raise ValueError(f"{layer.bits} bits not in one stream, as compressed-tensors before 0.18 packs them")
    codes = _streams(parts["weight_packed"], layer.bits)[:rows, :columns]
    scale = parts["weight_scale"].float()
    group = torch.arange(columns) // -(-columns // scale.shape[1])
    if "weight_g_idx" in parts and int(parts["weight_g_idx"].min()) >= 0:
        group = parts["weight_g_idx"].long()
    q = torch.from_numpy(codes).float() - middle
    if "weight_zero_point" in parts:
        zero = _streams(parts["weight_zero_point"].T.contiguous(), layer.bits).T[:rows]
        q = q - (torch.from_numpy(zero.copy()).float() - middle)[:, group]
    return q * scale[:, group]


def _integers(layer: Layer, parts: Parts) -> Tensor:
    weight, zero = parts["weight"], parts.get("weight_zero_point")
    codes = weight.float() if zero is None else weight.float() - _spread(zero.float(), weight.shape, layer)
    return codes * _spread(parts["weight_scale"].float(), weight.shape, layer)


def _floats8(layer: Layer, parts: Parts) -> Tensor:
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"a weight in {weight.dtype}")
    return weight.float() * _spread(_as_float(scale), weight.shape, layer)


def _floats4(layer: Layer, parts: Parts) -> Tensor:
    packed = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    if packed.dtype != torch.uint8:
        raise ValueError(f"a weight in {packed.dtype}")
    codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    scale = _as_float(parts["weight_scale"])
    if layer.divides_by_global and "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"].float()
    elif "weight_scale_2" in parts:
        scale = scale * parts["weight_scale_2"].float()
    return E2M1.decode(codes) * _spread(scale, codes.shape, layer)


def _gptq(layer: Layer, parts: Parts) -> Tensor:
    scales = parts["scales"].float()
    groups, columns = scales.shape
    codes = _streams(parts["qweight"].T.contiguous(), layer.bits)
    zeros = _streams(parts["qzeros"], layer.bits)[:, :columns]
    if layer.zero_points_less_one:
        zeros = (zeros + 1) % 2**layer.bits
    features = codes.shape[1]
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(features) // (features // groups)
    found = torch.from_numpy(codes).T.float() - torch.from_numpy(zeros.copy()).float()[group]
    return (found * scales[group]).T


def _awq(layer: Layer, parts: Parts) -> Tensor:
    scales = parts["scales"].float()
    features = parts["qweight"].shape[0]
    group = torch.arange(features) // (features // len(scales))

    def ordered(words: Tensor) -> Tensor:
        fields = _streams(words, layer.bits).reshape(len(words), -1, 8)[:, :, _AWQ_ORDER]
        return torch.from_numpy(fields.reshape(len(words), -1).copy()).float()

    return ((ordered(parts["qweight"]) - ordered(parts["qzeros"])[group]) * scales[group]).T


def _modelopt_integers(layer: Layer, parts: Parts) -> Tensor:
    packed = parts["weight"]
    if packed.dtype != torch.uint8:
        raise ValueError(f"a weight in {packed.dtype}")
    codes = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).float()
    codes = codes - 16 * (codes >= 8)
    weight = codes * _spread(parts["weight_scale"].float(), codes.shape, layer)
    factor = parts.get("pre_quant_scale")  # of the input, before the product
    return weight if factor is None else weight * factor.float()


LAYOUTS: dict[str, Callable[[Layer, Parts], Tensor]] = {
    "packed integers": _packed_integers,
    "integers": _integers,
    "8-bit floats": _floats8,
    "4-bit floats": _floats4,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt integers": _modelopt_integers,
}


def _streams(words: Tensor, bits: int) -> Array:
    """Rows of 32-bit words as little-endian bit streams, cut into fields: int32 (rows, fields)."""
    if words.dtype != torch.int32:
        raise ValueError(f"words in {words.dtype}")
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (fields.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(axis=2)


def _as_float(scale: Tensor) -> Tensor:
    """Scales; bytes are exponents (E8M0)."""
    if scale.dtype == torch.uint8:
        return E8M0.decode(scale)
    return scale.float()


def _spread(scale: Tensor, shape: torch.Size, layer: Layer) -> Tensor:
    """Scales, each over its block; the last blocks of an axis may be cut off.

    Raises:
        ValueError: there are too few or too many.
    """
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    scale = scale.reshape(len(scale), -1)
    height, width = layer.block
    height, width = height or rows, width or columns
    if scale.shape == (rows, 1):
        height, width = 1, columns
    if scale.shape != (-(-rows // height), -(-columns // width)):
        raise ValueError(f"scales {tuple(scale.shape)} for blocks of {height} x {width}")
    over = scale.repeat_interleave(height, 0)[:rows]
    return over.repeat_interleave(width, 1)[:, :columns]
