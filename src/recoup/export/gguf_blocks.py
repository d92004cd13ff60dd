"""GGUF's block types as lattices: which trained numbers a block can hold, and the bytes of one.

A block is a run of columns with one scale, in Q4_1 with one offset as well. The layouts are ggml's
(ggml/src/ggml-common.h, block_q8_0 and the like); where two or four codes share a byte, they stand half a
block, or 32 elements, apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.engines.llama_cpp import SCHEMES
from recoup.nn import CodedEmbedding, CodedLinear, Codes
from recoup.numerics import E2M1, E8M0, IntFormat, QuantSpec
from recoup.schemes import PRESETS, Scheme

Array = np.ndarray[Any, np.dtype[Any]]
_PRESETS = ", ".join(SCHEMES.values())


@dataclass(frozen=True, kw_only=True)
class Block:
    """A type.

    Args:
        first: what is added to a code, so that it counts from 0 or, in Q8_0, is the byte that it is.
        codes: codes of blocks (n, size) -> their bytes (n, ...).
        scale: scales (n, 1) -> their bytes.
        scale_last: the scale stands behind the codes.
    """

    first: int = 0
    codes: Callable[[Array], Array]
    scale: Callable[[Tensor], Array]
    scale_last: bool = False


def _float16(scale: Tensor) -> Array:
    stored = scale.half()
    assert torch.equal(stored.float(), scale.float()), "a trained scale lies on float16's grid"
    return stored.numpy().view(np.uint8)


def _exponents(scale: Tensor) -> Array:
    return E8M0.encode(scale).numpy()


def _halves(codes: Array) -> Array:
    return codes[:, :16] | codes[:, 16:] << 4


def _quarters(codes: Array) -> Array:
    """Both halves of 256 columns by themselves: elements j, j + 32, j + 64 and j + 96 in one byte."""
    fields = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(fields, axis=2).reshape(-1, 64)


BLOCKS: dict[str, Block] = {
    "Q8_0": Block(codes=lambda codes: codes, scale=_float16),
    "Q4_0": Block(first=8, codes=_halves, scale=_float16),
    "Q4_1": Block(codes=_halves, scale=_float16),
    "MXFP4": Block(codes=_halves, scale=_exponents),
    "TQ2_0": Block(first=1, codes=_quarters, scale=_float16, scale_last=True),
}


def check(path: str, scheme: Scheme, kind: type) -> None:
    """Can a block type hold a module of this type with this scheme, and does llama.cpp compute it?

    Raises:
        ValueError: no; names the module, the reason and what to do.
    """
    if kind not in (CodedLinear, CodedEmbedding):
        name = kind.__name__.removeprefix("Coded")
        raise ValueError(
            f"{path}: llama.cpp's models hold quantized Linears and Embeddings, not {name}s; keep it with "
            f"{{match: {path}, scheme: none}}, or export to onnx"
        )
    try:
        block_type(scheme, inputs=kind is CodedLinear)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def kernel(scheme: Scheme, kind: type) -> str:
    """The type of its blocks, from which llama.cpp chooses its kernels."""
    return block_type(scheme, inputs=kind is CodedLinear)


def block_type(scheme: Scheme, *, inputs: bool = True) -> str:
    """The type of a file that holds this scheme.

    Args:
        scheme: of a module.
        inputs: False for a table, which multiplies nothing.

    Raises:
        ValueError: none does.

    >>> from recoup.schemes import preset
    >>> block_type(preset("mxfp4-gguf"))
    'MXFP4'
    """
    for name, wanted in SCHEMES.items():
        if not _same_numbers(scheme.weights, PRESETS[wanted].weights):
            continue
        if not inputs or scheme.inputs == PRESETS[wanted].inputs:
            return name
        found = "float" if scheme.inputs is None else f"{scheme.inputs} ({scheme.inputs.scale_rule})"
        raise ValueError(
            f"scheme {scheme.name!r} has {found} inputs, but llama.cpp multiplies {name} weights by "
            f"{PRESETS[wanted].inputs}; use {wanted}"
        )
    nearest = _nearest(scheme.weights)
    raise ValueError(
        f"scheme {scheme.name!r}: no type of llama.cpp holds {scheme.weights} ({scheme.weights.scale_rule}) "
        f"weights; use {nearest}" + (f", or another of {_PRESETS}" if nearest != _PRESETS else "")
    )


def pack(name: str, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Array:
    """The bytes of a matrix: codes (rows, columns), scales and offsets (rows, blocks) -> (rows, bytes)."""
    block, rows = BLOCKS[name], codes.shape[0]
    counted = (codes.to(torch.int16) + block.first).numpy().astype(np.uint8)  # int8 wraps to its own byte
    parts = [block.scale(scale.reshape(-1, 1)), block.codes(counted.reshape(scale.numel(), -1))]
    if offset is not None:
        parts.insert(1, _float16(offset.reshape(-1, 1)))
    return np.concatenate(parts[::-1] if block.scale_last else parts, axis=1).reshape(rows, -1)


def packed(weight: Codes, name: str, order: Tensor | None) -> Array:
    """A trained weight as the file holds it, its rows in this order."""
    rows: Mapping[str, Tensor | None] = {
        "codes": weight.codes,
        "scale": weight.scale,
        "offset": weight.offset,
    }
    picked = {
        key: tensor if tensor is None or order is None else tensor[order] for key, tensor in rows.items()
    }
    codes, scale = picked["codes"], picked["scale"]
    assert codes is not None
    assert scale is not None
    return pack(name, codes, scale.detach(), picked["offset"])


def _same_numbers(spec: QuantSpec, other: QuantSpec) -> bool:
    """One grid of codes, one grid of scales, both with or without an offset; how scales are found is free."""
    grid = ("format", "granularity", "scale_format", "global_scale", "symmetric", "has_offset")
    return all(getattr(spec, name) == getattr(other, name) for name in grid)


def _nearest(spec: QuantSpec) -> str:
    if spec.format == E2M1:
        return SCHEMES["MXFP4"]
    if not isinstance(spec.format, IntFormat):
        return _PRESETS
    by_bits = {2: "TQ2_0", 3: "Q4_0", 4: "Q4_0" if spec.symmetric else "Q4_1"}
    return SCHEMES[by_bits.get(spec.format.bits, "Q8_0")]
