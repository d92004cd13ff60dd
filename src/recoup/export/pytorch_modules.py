"""The modules with which torch's own operators compute exactly the trained lattice, on any CPU.

    weights                        inputs                         computed as
    one scale per row or tensor,   int8 or uint8, per token or    the codes of both multiplied in integers
    no zero point                  tensor, dynamic or static      (`aten._int_mm`), then the scales
    any integers                   float, or integers             packed codes made float, row by row, then
                                                                  `aten.linear` in float
    a convolution                  float, or integers             the same, then `aten.convNd`, or
                                                                  `aten.conv_transposeNd`
    an embedding                   -                              the rows that are asked for, made float

An integer product is exact where sums of products are, and on x86 without VNNI they are not: oneDNN adds two
products of a byte in 16 bits there, which saturate. So the program asks the processor first, with a product
that would saturate, and where that is wrong it multiplies the upper seven bits of the weights and the lowest
one by themselves: no pair of those leaves 16 bits. See docs/decisions/0015.

Codes of up to 4 bits share bytes: byte j of a row of k bytes holds the codes j, j + k, ... of the row, the
first in the lowest bits, as distances from the smallest code of their container.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn import (
    CodedConv,
    CodedConvTranspose,
    CodedEmbedding,
    CodedLinear,
    CodedModule,
    Codes,
    FakeQuantizer,
)
from recoup.numerics import FLOAT32, IntFormat, QuantSpec
from recoup.schemes import Scheme

_int_mm: Callable[[Tensor, Tensor], Tensor] = torch._int_mm  # pyright: ignore
_LONGEST_INTEGER_SUM = 2**16  # of products of 255 and 128: less than 2^31, also with a zero point


def check(path: str, scheme: Scheme) -> None:
    """Can torch's operators compute this?

    Raises:
        ValueError: they cannot; the message says what they can.
    """
    try:
        _check_weights(scheme.weights)
        if scheme.inputs is not None:
            _check_inputs(scheme.inputs)
    except ValueError as error:
        raise ValueError(
            f"{path}: scheme {scheme.name!r} does not run in torch on a CPU: {error}; "
            "w8a8, w8a8-static, w8a8-ort, w4a8, w8a16, w4a16 and their relatives do"
        ) from None


def kernel(scheme: Scheme, kind: type) -> str:
    """The operator of torch that computes it; a matrix of very many columns is made float in any case."""
    if issubclass(kind, CodedEmbedding):
        return "embedding of integers made float"
    if issubclass(kind, CodedConv):
        transposed = issubclass(kind, CodedConvTranspose)
        return f"conv{'_transpose' * transposed} of integers made float"
    return "_int_mm" if multiplies_integers(scheme, 1) else "linear of integers made float"


def width(scheme: Scheme, kind: type) -> int:
    """The bits that a code of its weight takes in the program."""
    integers = issubclass(kind, CodedLinear) and multiplies_integers(scheme, 1)
    return 8 if integers else container_bits(scheme.weights)


def _check_weights(spec: QuantSpec) -> None:
    if not isinstance(spec.format, IntFormat) or spec.global_scale or spec.has_offset:
        beside = " with offsets" if spec.has_offset else ""
        raise ValueError(f"{spec.format.name} weights{beside} have no operator there")


def _check_inputs(spec: QuantSpec) -> None:
    if not isinstance(spec.format, IntFormat) or spec.scale_format != FLOAT32 or spec.has_offset:
        raise ValueError(
            f"{spec.format.name} inputs with {spec.scale_format.name} scales have no operator there"
        )
    dynamic = spec.ranges == "dynamic"
    rows_and_columns = (spec.granularity.rows, spec.granularity.columns)
    if dynamic and spec.scale_rule not in ("narrow", "affine"):
        raise ValueError(
            f"inputs {spec} with scales by {spec.scale_rule} are not built; narrow and affine are"
        )
    if not (rows_and_columns == (None, None) or (dynamic and spec.granularity.rows == 1)):
        raise ValueError(f"inputs {spec} are not built; per tensor, and dynamic per token or in groups, are")


def multiplies_integers(scheme: Scheme, columns: int) -> bool:
    """Is the product of this linear layer one of integers?"""
    weights, inputs = scheme.weights, scheme.inputs
    whole_rows = weights.granularity.columns is None and weights.granularity.rows in (1, None)
    return (
        inputs is not None
        and inputs.granularity.columns is None
        and whole_rows
        and weights.symmetric
        and columns <= _LONGEST_INTEGER_SUM
    )


def container_bits(spec: QuantSpec) -> int:
    """The width a code takes in a packed row.

    >>> from recoup.schemes import preset
    >>> [container_bits(preset(name).weights) for name in ("w2a16", "w3a16", "w4a16", "w8a16")]
    [2, 4, 4, 8]
    """
    return next(width for width in (2, 4, 8) if spec.format.bits <= width)


def container_zero(spec: QuantSpec) -> int:
    """What the code 0 is stored as in a packed row."""
    return 2 ** (container_bits(spec) - 1) if spec.format.lo else 0


class Processor:
    """What the program asks about the processor it runs on: once in every call, and only if it matters."""

    def __init__(self) -> None:
        self._exact: Tensor | None = None

    def forget(self) -> None:
        """A new call begins."""
        self._exact = None

    def multiplies_exactly(self) -> Tensor:
        """A boolean: does a sum of products of bytes come out right that 16 bits cannot hold?"""
        if self._exact is None:
            # oneDNN adds 128 to the first operand, so a pair is 2 * 255 * 127; the size is one of real layers
            largest = torch.full((16, 64), 127, dtype=torch.int8)
            self._exact = (_int_mm(largest, largest.t()) == 64 * 127 * 127).all()
        return self._exact


def _product(codes: Tensor, weight: Tensor) -> Tensor:
    return _int_mm(codes, weight.t())


def _product_of_parts(codes: Tensor, weight: Tensor) -> Tensor:
    upper = _int_mm(codes, (weight >> 1).t())
    return upper.mul_(2).add_(_int_mm(codes, (weight & 1).t()))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """No node in the program where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


class _InputCodes(nn.Module):
    """x -> its codes, as floats, in blocks along the last axis; their scales; and their zero points."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, quantizer: FakeQuantizer) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)
        if self.spec.ranges != "dynamic":
            qparams = quantizer.stored_qparams
            self.scale = qparams.scale.detach().clone().reshape(1, 1, 1)
            if qparams.zero_point is not None:
                self.zero_point = qparams.zero_point.detach().to(torch.int32).reshape(1, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The equation, as in numerics/quantize.py; blocks are (tokens, blocks of a token, elements)."""
        columns = self.spec.granularity.columns or x.shape[-1]
        blocks = _cast(x, torch.float32).reshape(-1, x.shape[-1] // columns, columns)
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            scale, zero_point = self._ranges(blocks)
        codes = (blocks / scale).round_()
        if zero_point is not None:
            codes = codes.add_(zero_point)
        return codes.clamp_(self.spec.format.lo, self.spec.format.hi), scale, zero_point

    def _ranges(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = self.spec.format
        over = (0, 1, 2) if self.spec.granularity.rows is None else (-1,)
        if self.spec.symmetric:
            amax = blocks.abs().amax(over, keepdim=True)
            scale = (amax / grid.hi).clamp(min=FLOAT32.floor)
            return torch.where(amax == 0, 1.0, scale), None
        lo = blocks.amin(over, keepdim=True).clamp(max=0)
        hi = blocks.amax(over, keepdim=True).clamp(min=0)
        scale = ((hi - lo) / (grid.hi - grid.lo)).clamp(min=FLOAT32.floor)
        scale = torch.where(lo == hi, 1.0, scale)
        return scale, (grid.lo - torch.round(lo / scale)).clamp(grid.lo, grid.hi)


class _IntegerLinear(nn.Module):
    """y = (q - zero point) codes^T, in integers, times the scales, plus the bias."""

    codes: Tensor
    scale: Tensor
    total: Tensor | None

    def __init__(self, module: CodedLinear, processor: Processor) -> None:
        super().__init__()
        assert isinstance(module.input_quantizer, FakeQuantizer)
        self.dtype, self.processor = module.weight.dtype, processor
        self.register_buffer("codes", module.weight.codes.to(torch.int8).contiguous())
        self.register_buffer("scale", module.weight.scale.reshape(-1))
        self.bias = module.bias
        self.input_codes = _InputCodes(module.input_quantizer)
        # unsigned codes are stored less 128, so that they are bytes with a sign
        self.middle = 0 if self.input_codes.spec.format.lo else 2 ** (self.input_codes.spec.format.bits - 1)
        shifted = self.middle or not self.input_codes.spec.symmetric
        self.register_buffer("total", self.codes.sum(1, dtype=torch.int32) if shifted else None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        codes, scale, zero_point = self.input_codes(input)
        codes, scale = codes.flatten(1), scale.flatten(1)
        if self.middle:
            codes = codes.sub_(self.middle)
        product: Any = torch.ops.higher_order.cond(  # torch.cond compiles each branch first, for seconds
            self.processor.multiplies_exactly(),
            _product,
            _product_of_parts,
            (codes.to(torch.int8), self.codes),
        )
        if self.total is not None:
            assert zero_point is not None
            product = product - (zero_point.flatten(1) - self.middle).to(torch.int32) * self.total
        y = (product * scale).mul_(self.scale)
        if self.bias is not None:
            y = y.add_(self.bias)
        return _cast(y.reshape(*input.shape[:-1], y.shape[-1]), self.dtype)


class _Packed(nn.Module):
    """Packed rows of codes, and what they stand for."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: Codes) -> None:
        super().__init__()
        self.rows, self.columns = weight.codes.shape
        self.bits, self.zero = container_bits(weight.spec), container_zero(weight.spec)
        self.dtype = weight.dtype
        self.register_buffer("codes", pack(weight).contiguous())
        self.register_buffer("scale", weight.scale.clone())
        self.register_buffer("zero_point", None)
        if weight.zero_point is not None:
            self.zero_point = (weight.zero_point + self.zero).to(torch.uint8)

    def matrix(self) -> Tensor:
        """All rows."""
        blocks = self._unpacked(self.codes).unflatten(0, (self.scale.shape[0], -1))
        blocks = blocks.unflatten(2, (self.scale.shape[1], -1))
        zero_point = None if self.zero_point is None else self.zero_point[:, None, :, None]
        values = self._centred(blocks, zero_point).mul_(self.scale[:, None, :, None])
        return _cast(values.reshape(self.rows, self.columns), self.dtype)

    def of_rows(self, ids: Tensor) -> Tensor:
        """The rows with these indices, (..., columns)."""
        which = ids if self.scale.shape[0] == self.rows else ids // (self.rows // self.scale.shape[0])
        blocks = self._unpacked(self.codes[ids]).unflatten(-1, (self.scale.shape[1], -1))
        zero_point = None if self.zero_point is None else self.zero_point[which][..., None]
        values = self._centred(blocks, zero_point).mul_(self.scale[which][..., None])
        return _cast(values.flatten(-2), self.dtype)

    def _centred(self, blocks: Tensor, zero_point: Tensor | None) -> Tensor:
        if zero_point is not None:
            return blocks.sub_(zero_point)
        return blocks.sub_(self.zero) if self.zero else blocks

    def _unpacked(self, rows: Tensor) -> Tensor:
        """Codes as floats that are nobody else's."""
        if self.bits == 8:
            return rows.to(torch.float32, copy=True)
        mask, shifts = 2**self.bits - 1, range(0, 8, self.bits)
        fields = torch.cat([(rows >> shift) & mask if shift else rows & mask for shift in shifts], dim=-1)
        return fields[..., : self.columns].to(torch.float32)


def pack(weight: Codes) -> Tensor:
    """Rows of bytes; see the head of this file."""
    bits = container_bits(weight.spec)
    codes = (weight.codes.to(torch.int16) + container_zero(weight.spec)).to(torch.uint8)
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (per_byte, -1))
    packed = torch.zeros_like(codes[:, 0])
    for place in range(per_byte):
        packed |= codes[:, place] << (bits * place)
    return packed


class _FloatInput(nn.Module):
    """Q(x), as the trained module sees it."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.codes = _InputCodes(quantizer) if isinstance(quantizer, FakeQuantizer) else None

    def forward(self, x: Tensor) -> Tensor:
        """The equation."""
        if self.codes is None:
            return x
        codes, scale, zero_point = self.codes(x)
        if zero_point is not None:
            codes = codes.sub_(zero_point)
        return _cast(codes.mul_(scale).reshape(x.shape), x.dtype)


class _FloatLinear(nn.Module):
    """y = Q(x) decode(codes)^T + b."""

    def __init__(self, module: CodedLinear) -> None:
        super().__init__()
        self.weight, self.input = _Packed(module.weight), _FloatInput(module.input_quantizer)
        self.bias = module.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return F.linear(self.input(input), self.weight.matrix(), self.bias)


class _FloatConv(nn.Module):
    """y = decode(codes) * Q(x) + b."""

    def __init__(self, module: CodedConv) -> None:
        super().__init__()
        self.weight, self.input = _Packed(module.weight), _FloatInput(module.input_quantizer)
        self.bias = module.bias
        self.summed = module.summed  # reads the geometry alone

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return self.summed(self.input(input), self.weight.matrix(), self.bias)


class _Embedding(nn.Module):
    """y = decode(codes)[ids]."""

    def __init__(self, module: CodedEmbedding) -> None:
        super().__init__()
        self.weight = _Packed(module.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return self.weight.of_rows(input)


def opened(module: CodedModule, processor: Processor) -> nn.Module:
    """The module that torch.export traces in place of a coded one."""
    if isinstance(module, CodedLinear):
        if multiplies_integers(module.scheme, module.in_features):
            return _IntegerLinear(module, processor)
        return _FloatLinear(module)
    if isinstance(module, CodedConv):
        return _FloatConv(module)
    assert isinstance(module, CodedEmbedding)
    return _Embedding(module)
