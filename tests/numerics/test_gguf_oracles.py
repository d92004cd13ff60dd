"""GGUF's block types against gguf's numpy quantizers, which are ggml's reference to the bit.

ggml decides codes with the float32 scale and stores it as float16; we decide with what is stored. So the
scales are equal, the codes that differ are computed from ggml's formula, and tensors that lie on our lattice
already, as trained ones do, come out of ggml's quantizer as the very bytes that we would write.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from recoup.numerics import (
    FLOAT32,
    QParams,
    QuantSpec,
    dequantize,
    fake_quantize,
    qparams_of,
    quantize,
)
from recoup.schemes import preset

from .inputs import DTYPES, drawn
from .tables import bits, over

Array = np.ndarray


def _halves(codes: Array) -> Array:
    """Two to a byte: element j in the low nibble, element j + 16 in the high one."""
    return codes[:, :16] | codes[:, 16:] << 4


def _nibbles(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _pairs(codes: Array) -> Array:
    """Four to a byte: elements j, j + 32, j + 64 and j + 96, in both halves of 256."""
    quarters = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(quarters, axis=2).reshape(-1, 64)


def _unpaired(packed: Array) -> Array:
    return (packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 256)


def _rounded_away(x: Array) -> Array:
    return np.trunc(x + np.copysign(np.float32(0.5), x))


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block type: our lattice, its bytes, and how ggml decides a code.

    Args:
        spec: the lattice.
        kind: gguf's name.
        pack: codes, counted from 0, to bytes; `unpack` is its inverse.
        decide: ggml's codes, counted from 0, of x * (1 / d).
        first: the scale comes before the codes.
    """

    spec: QuantSpec
    kind: GGMLQuantizationType
    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]
    decide: Callable[[Array], Array]
    first: bool = True

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def size(self) -> int:
        return self.spec.granularity.columns or 0

    @property
    def offset(self) -> int:
        """What is added to a code in the file."""
        return {GGMLQuantizationType.Q4_0: 8, GGMLQuantizationType.TQ2_0: 1}.get(self.kind, 0)

    def bytes(self, codes: Tensor, scale: Tensor) -> Array:
        """What a file holds."""
        stored = scale.reshape(-1, 1).numpy().astype(np.float16).view(np.uint8)
        counted = (codes.reshape(-1, self.size).to(torch.int16) + self.offset).numpy().astype(np.uint8)
        parts = [stored, self.pack(counted)]
        return np.concatenate(parts if self.first else parts[::-1], axis=1)

    def read(self, packed: Array) -> tuple[Array, Array]:
        """Codes and scales of a file, a block to a row."""
        rows = packed.reshape(-1, gguf.GGML_QUANT_SIZES[self.kind][1])
        scale = np.ascontiguousarray(rows[:, :2] if self.first else rows[:, -2:]).view(np.float16)
        codes = self.unpack(rows[:, 2:] if self.first else rows[:, :-2])
        if self.kind == GGMLQuantizationType.Q8_0:
            return codes.view(np.int8), scale
        return codes.astype(np.int8) - np.int8(self.offset), scale


def preset_weights(name: str) -> QuantSpec:
    """What the preset of this name trains, with scales of whatever comes."""
    return replace(preset(name).weights, ranges="dynamic")


TYPES = (
    Block(
        kind=GGMLQuantizationType.Q8_0,
        spec=preset_weights("q8_0"),
        pack=lambda codes: codes,
        unpack=lambda packed: packed,
        decide=_rounded_away,
    ),
    Block(
        kind=GGMLQuantizationType.Q4_0,
        spec=preset_weights("q4_0"),
        pack=_halves,
        unpack=_nibbles,
        decide=lambda x: np.trunc(x + np.float32(8.5)).clip(0, 15) - 8,
    ),
    Block(
        kind=GGMLQuantizationType.TQ2_0,
        spec=preset_weights("tq2_0"),
        pack=_pairs,
        unpack=_unpaired,
        decide=_rounded_away,
        first=False,
    ),
)
every_type = over("block", TYPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(size: int, dtype: torch.dtype) -> Tensor:
    """Random rows, and rows of multiples of half a step whose largest value is a whole number of steps."""
    x = drawn(dtype, 32, 2 * size)
    ties = torch.randint(-254, 255, (32, 2 * size)) / 2
    ties[:16] /= 16
    ties[:, ::size] = torch.tensor([127.0, -128.0]).repeat(16)[:, None]
    ties[:16, ::size] /= 16
    ties[31] = 0.0
    return torch.cat([x, ties.to(dtype)])


def other_sign(block: Block, x: Tensor) -> Tensor:
    """Blocks of Q4_0 that hold both +m and -m as their largest: ggml takes the first, we take -m."""
    rows = x.float().reshape(-1, block.size)
    first = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return (first > 0) & (rows == -first[:, None]).any(1) & torch.tensor(block.name == "Q4_0")


@every_type
@every_dtype
def test_the_stored_scale_is_ggmls(block: Block, dtype: torch.dtype) -> None:
    """But its sign, where there is a choice (gguf/quants.py line 225: argmax), and that of zeros."""
    x = inputs(block.size, dtype)
    x[3, 0], x[3, 1], x[4, 0], x[4, 1] = -500, 500, 500, -500
    ours = qparams_of(x, block.spec).scale.reshape(-1)
    _, theirs = block.read(gguf.quantize(x.float().numpy(), block.kind))
    theirs = torch.tensor(theirs[:, 0]).float()
    nothing, negated = (x.reshape(-1, block.size) == 0).all(1), other_sign(block, x)
    assert nothing.any()
    assert negated.any() == (block.name == "Q4_0")
    assert torch.equal(ours != theirs, nothing | negated)
    assert torch.equal(ours[negated], -theirs[negated])
    assert ((theirs[nothing] == 0).all(), (ours[nothing] == 1).all()) == (True, True)


@every_type
@every_dtype
def test_codes_differ_where_ggmls_formula_says_so_and_nowhere_else(block: Block, dtype: torch.dtype) -> None:
    """ggml-quants.c, quantize_row_*_ref: float32 scale, times 1 / d, and half away from zero or up."""
    x = inputs(block.size, dtype)
    x = x.reshape(-1, block.size)[~other_sign(block, x)]
    codes, _ = block.read(gguf.quantize(x.float().numpy(), block.kind))
    unrounded = replace(block.spec, scale_format=FLOAT32)
    qparams, scale = qparams_of(x, block.spec), qparams_of(x, unrounded).scale.numpy()
    values = x.float().numpy()
    theirs = block.decide(values * (np.float32(1) / scale)).astype(np.int8)
    np.testing.assert_array_equal(codes, theirs)

    position = values.astype(np.float64) / scale
    moved = codes != quantize(x, qparams, block.spec).numpy()
    # Only a tie can move, or what the rounding of the scale moves to one.
    reach = np.abs(position) * (np.abs(scale / qparams.scale.numpy() - 1) + 2.0**-22)
    assert (np.abs(np.abs(position - np.trunc(position)) - 0.5) <= reach)[moved].all()
    assert moved.any()
    assert moved.mean() < 0.1


@every_type
def test_ggmls_ties(block: Block) -> None:
    """With a scale of 1, which is exact in every step: half away from zero, or half up for Q4_0."""
    lo = block.spec.format.lo
    ties = torch.arange(-16, 16) / 2
    ties = ties[(ties > lo) & (ties < block.spec.format.hi)]
    x = torch.zeros(1, block.size)
    x[0, : len(ties)], x[0, -1] = ties, lo
    codes, scale = block.read(gguf.quantize(x.numpy(), block.kind))
    assert scale.item() == 1.0
    ours = quantize(x, qparams_of(x, block.spec), block.spec).numpy()
    up = np.floor(x.numpy() + 0.5) if block.name == "Q4_0" else _rounded_away(x.numpy())
    np.testing.assert_array_equal(codes, up)
    np.testing.assert_array_equal(ours, np.rint(x.numpy()))
    np.testing.assert_array_equal(codes != ours, up != np.rint(x.numpy()))


@every_type
@every_dtype
def test_what_lies_on_our_lattice_passes_through_ggmls_quantizer_unchanged(
    block: Block, dtype: torch.dtype
) -> None:
    """What training leaves behind: the bytes are those we would write, although the formulas differ."""
    x = inputs(block.size, dtype)
    x = x.reshape(-1, block.size)[~other_sign(block, x)].float()
    # A subnormal float16 scale can be so far from amax / hi that no value has the largest code.
    x = x[qparams_of(x, block.spec).scale[:, 0].abs() >= 2.0**-14]
    x = x[x.any(1)]  # a block of zeros has scale 0 there and 1 here
    qparams = qparams_of(x, block.spec)
    y = fake_quantize(x, qparams, block.spec)
    packed = gguf.quantize(y.numpy(), block.kind).reshape(-1, gguf.GGML_QUANT_SIZES[block.kind][1])
    np.testing.assert_array_equal(packed, block.bytes(quantize(x, qparams, block.spec), qparams.scale))


@every_type
def test_every_code_decodes_to_our_value(block: Block) -> None:
    """All codes under many float16 scales, negative, subnormal and largest ones too."""
    lo, hi = int(block.spec.format.lo), int(block.spec.format.hi)
    scale = torch.tensor([1.0, -1.0, 0.3, -7.7, 2.0**-24, -(2.0**-15), 1e-5, 65504.0]).half().float()
    codes = torch.arange(lo, lo + block.size).remainder(hi - lo + 1) + lo
    codes = torch.cat([codes.expand(len(scale), -1)]).to(torch.int8)
    every = torch.cat([codes.roll(shift, 1) for shift in (0, block.size // 2, 1)])
    if block.size < hi - lo + 1:
        more = [torch.arange(start, start + 32).clamp(max=hi) for start in range(lo, hi, 32)]
        every = torch.cat([every, *(row.to(torch.int8).expand(len(scale), -1) for row in more)])
    assert every.unique().tolist() == list(range(lo, hi + 1))
    scale = scale.repeat(len(every) // len(scale))[:, None]
    values = gguf.dequantize(block.bytes(every, scale), block.kind)
    ours = dequantize(every, QParams(scale=scale), block.spec)
    np.testing.assert_array_equal(bits(values + 0.0), bits(ours + 0.0))  # a sum with 0 has no -0


def test_scales_that_float16_cannot_hold() -> None:
    """Below 2^-25 ggml stores 0 and above 65504 infinity; we store float16's smallest and largest number."""
    block = TYPES[0]
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 127 * 2.0**-26, 127 * 70000.0
    with np.errstate(over="ignore"):
        _, theirs = block.read(gguf.quantize(x.numpy(), block.kind))
    assert theirs[:, 0].tolist() == [0.0, np.inf]
    assert qparams_of(x, block.spec).scale[:, 0].tolist() == [2.0**-24, 65504.0]


# --- Q4_1 -------------------------------------------------------------------------------------------------

Q4_1 = preset_weights("q4_1")


def q4_1(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets of ggml, a block to a row."""
    rows = gguf.quantize(x.float().numpy(), GGMLQuantizationType.Q4_1).reshape(-1, 20)
    header = torch.tensor(np.ascontiguousarray(rows[:, :4]).view(np.float16)).float()
    return torch.tensor(_nibbles(rows[:, 4:])), header[:, :1], header[:, 1:]


@every_dtype
def test_q4_1_has_a_scale_and_an_offset_and_rounds_half_up(dtype: torch.dtype) -> None:
    """gguf/quants.py lines 262 to 271: codes of the unrounded minimum and scale, stored as float16."""
    x = inputs(32, dtype).reshape(-1, 32)
    codes, scale, offset = q4_1(x)
    qparams = qparams_of(x, Q4_1)
    assert qparams.offset is not None
    lo, hi = x.float().amin(1, keepdim=True), x.float().amax(1, keepdim=True)
    flat = lo == hi
    assert torch.equal(scale != qparams.scale, flat)
    assert torch.equal(offset, qparams.offset)
    unrounded = (hi - lo) / 15
    theirs = torch.trunc((x.float() - lo) * torch.where(flat, 0.0, 1 / unrounded) + 0.5).clamp(0, 15)
    assert torch.equal(codes, theirs.to(torch.uint8))

    exact = (x.double() - lo) / unrounded
    moved = codes != quantize(x, qparams, Q4_1)
    # A code moves by what rounding does to the offset, in steps, and to the scale.
    reach = (lo - qparams.offset).abs() / unrounded + exact * ((unrounded / qparams.scale - 1).abs() + 2**-21)
    assert ((exact.frac() - 0.5).abs() <= reach + 2.0**-20)[moved].all()
    assert 0 < moved.float().mean() < 0.1


def test_q4_1_decodes_to_our_values_and_the_trained_lattice_passes_through() -> None:
    """Where both ends of the range are reached: a block that no longer uses code 0 or 15 is another block."""
    x = inputs(32, torch.float32)[:-1].reshape(-1, 32)
    qparams = qparams_of(x, Q4_1)
    codes = quantize(x, qparams, Q4_1)
    header = torch.cat([qparams.scale, qparams.offset], dim=1).half().numpy().view(np.uint8)
    stored = np.concatenate([header, _halves(codes.numpy())], axis=1)
    values = gguf.dequantize(stored, GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(values, dequantize(codes, qparams, Q4_1).numpy())

    ends = (codes.amin(1) == 0) & (codes.amax(1) == 15)
    again, _, _ = q4_1(fake_quantize(x, qparams, Q4_1))
    assert ends.float().mean() > 0.8
    assert torch.equal(again[ends], codes[ends])
