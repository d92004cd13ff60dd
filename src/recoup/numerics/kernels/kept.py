"""What a layer keeps of a quantized tensor between its forward and its backward pass: one byte a value.

    kept = keep(x, qparams, spec)       quantize, as `numerics.quantize` does, to the bytes of a `Carrier`
    restore(kept, out)                  the values that `fake_quantize(x)` has, bit for bit
    clip_(grad, kept)                   the straight-through gradient of x, in place

On a CPU they run over pieces that stay in a core's cache from one operation to the next, so that memory is
read once and written once; and in place, because fresh memory costs more than what is done with it.
`compiled.py` makes one kernel of each instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from recoup.numerics.floats import E8M0, FLOAT32
from recoup.numerics.granularity import cut, spread
from recoup.numerics.kernels.carrier import Carrier, carrier_of
from recoup.numerics.kernels.place import place
from recoup.numerics.quantize import is_finite, qparams_of
from recoup.numerics.spec import QParams, QuantSpec

# Elements of a piece: float32 values that fit in a core's cache.
PIECE = 2**18
_TO_THE_END = {  # by scale format: the rules that put a block's largest value on the grid's end or before it
    FLOAT32: ("narrow", "no-clip", "pow2", "ceil", "rceil"),
    E8M0: ("pow2", "ceil", "rceil"),
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A quantized tensor as bytes, and what they mean.

    Args:
        values: one byte each, in the shape of the 2-D view.
        qparams: with which they were decided.
        spec: the lattice.
        saturated: where the bytes do not tell, one bit for each value, eight to a byte; None where they tell
            or nothing can saturate.
        known: what an implementation has found out about them, for the next time.
    """

    values: Shaped[Tensor, "r c"]
    qparams: QParams
    spec: QuantSpec
    saturated: Tensor | None
    known: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False, compare=False)

    @property
    def carrier(self) -> Carrier:
        """How the bytes are read."""
        return carrier_of(self.spec.format)

    @property
    def nbytes(self) -> int:
        """Without the scales."""
        return self.values.nbytes + (0 if self.saturated is None else self.saturated.nbytes)


class NotFiniteError(ValueError):
    """A tensor holds NaN or infinity, which no byte can say."""


def keep(x: Float[Tensor, "r c"], qparams: QParams | None, spec: QuantSpec, before: Kept | None) -> Kept:
    """Quantize x to kept bytes.

    Args:
        x: what is quantized.
        qparams: with which; None takes those of x's own values.
        spec: the lattice.
        before: kept bytes that nobody needs any more, to be written over; None makes new ones.

    Raises:
        NotFiniteError: x is not finite. Only on a CPU: elsewhere an answer would have to be waited for, and
            a block with NaN stays NaN; see `loud`.

    >>> from recoup.numerics import IntFormat, fake_quantize, per_group
    >>> spec = QuantSpec(
    ...     format=IntFormat(4), granularity=per_group(32), scale_rule="half-range", ranges="static"
    ... )
    >>> x = torch.randn(4, 64)
    >>> kept = keep(x, qparams_of(x, spec), spec, None)
    >>> torch.equal(restore(kept, torch.empty(4, 64)), fake_quantize(x, kept.qparams, spec)), kept.nbytes
    (True, 256)
    """
    x, carrier = x.detach(), carrier_of(spec.format)
    qparams = loud(x, qparams_of(x, spec) if qparams is None else qparams, spec)
    if x.device.type == "cpu" and not is_finite(qparams.scale if spec.ranges == "dynamic" else x):
        raise NotFiniteError
    values = room_for(x, spec, before)
    bits: list[Tensor] = []
    for rows, of_rows in _pieces(x, qparams, spec):
        work = place("position", x[rows].shape, torch.float32, x.device)
        saturated = encode(x[rows], of_rows, spec, carrier, values[rows], work)
        if saturated is not None:
            bits.append(saturated)
    packed = pack_bits(torch.cat(bits)) if bits else None
    return Kept(values=values, qparams=qparams, spec=spec, saturated=packed)


def room_for(x: Float[Tensor, "r c"], spec: QuantSpec, before: Kept | None) -> Shaped[Tensor, "r c"]:
    """Where the bytes go: over those from before, if there are any."""
    if before is not None:
        return before.values
    return torch.empty(x.shape, dtype=carrier_of(spec.format).dtype, device=x.device)


def loud(x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> QParams:
    """The qparams with a scale of NaN for blocks with NaN, which no byte can say.

    On a CPU such a tensor is refused. Scales that come from the tensor itself are NaN already.
    """
    if x.device.type == "cpu" or spec.ranges == "dynamic":
        return qparams
    return with_nan(x, qparams, spec)


def with_nan(x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec) -> QParams:
    """`loud` on any device."""
    has_nan = cut(x, spec.granularity).isnan().any(dim=3).any(dim=1)
    return replace(qparams, scale=torch.where(has_nan, torch.nan, qparams.scale))


def encode(
    x: Float[Tensor, "r c"],
    qparams: QParams,
    spec: QuantSpec,
    carrier: Carrier,
    out: Shaped[Tensor, "r c"],
    work: Float[Tensor, "r c"],
) -> Tensor | None:
    """The bytes of x, written into `out`; returns 1 where its values saturate, if bytes alone do not tell.

    The steps of `numerics.quantize`, in place in `work`.
    """
    rounded = cut(work, spec.granularity)
    if qparams.offset is None:
        torch.div(cut(x, spec.granularity), spread(qparams.step), out=rounded)
    else:
        torch.sub(cut(x, spec.granularity), spread(qparams.offset), out=rounded)
        rounded.div_(spread(qparams.step))
    carrier.rint_(rounded)
    if qparams.zero_point is not None:
        rounded.add_(spread(qparams.zero_point))
    beyond = None
    if may_saturate(spec, carrier) and not carrier.marks:
        difference = rounded.clamp(spec.format.lo, spec.format.hi).sub_(rounded)
        beyond = difference.abs_().clamp_(max=1).ceil_().to(torch.uint8)  # a bool of it would take far longer
    carrier.pack(rounded, cut(out, spec.granularity))
    return None if beyond is None else beyond.reshape(x.shape)


def restore(kept: Kept, out: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """The values, written into `out` (contiguous) and rounded to its dtype as `fake_quantize` does."""
    for rows, of_rows in _pieces(kept.values, kept.qparams, kept.spec):
        if out.dtype == torch.float32:
            decode(kept.values[rows], of_rows, kept.spec, kept.carrier, out[rows])
        else:
            work = place("values", out[rows].shape, torch.float32, out.device)
            out[rows] = decode(kept.values[rows], of_rows, kept.spec, kept.carrier, work)
    return out


def decode(
    values: Tensor, qparams: QParams, spec: QuantSpec, carrier: Carrier, out: Float[Tensor, "r c"]
) -> Float[Tensor, "r c"]:
    """What bytes stand for, written into float32; the steps of `numerics.dequantize`, in place."""
    blocks = cut(out, spec.granularity)
    carrier.unpack(cut(values, spec.granularity), blocks)
    if qparams.zero_point is not None:
        blocks.sub_(spread(qparams.zero_point))
    blocks.mul_(spread(qparams.step))
    if qparams.offset is not None:
        blocks.add_(spread(qparams.offset))
    return out


def clip_(grad: Float[Tensor, "r c"], kept: Kept) -> Float[Tensor, "r c"]:
    """The gradient of x from that of the values, in place and contiguous: 0 where a value saturated.

    The reference multiplies by 0 there, which makes NaN of infinity and -0 of a negative number.
    """
    if not may_saturate(kept.spec, kept.carrier):
        return grad
    if kept.saturated is not None:
        return grad.mul_(1 - unpack_bits(kept.saturated, grad.numel()).reshape(grad.shape))
    size = PIECE if grad.device.type == "cpu" else max(1, grad.numel())
    for part, bytes_ in zip(grad.view(-1).split(size), kept.values.view(-1).split(size), strict=True):
        kept.carrier.clip_(part, bytes_, place("bytes", part.shape, part.dtype, part.device))
    return grad


def may_saturate(spec: QuantSpec, carrier: Carrier) -> bool:
    """Some value may lie beyond the grid, and its gradient is asked for.

    Scales that come from the tensor itself, by a rule that puts the largest value on the end of the grid or
    before it, leave nothing beyond, if the grid rounds what lies a division's last bit beyond to its end.
    """
    if spec.gradient == "pass-through" or spec.ranges == "learned":
        return False
    if spec.ranges == "static" or not carrier.holds_its_ends:
        return True
    return spec.scale_rule not in _TO_THE_END.get(spec.scale_format, ())


def matrices(kept: Kept, count: int) -> list[Kept]:
    """Those of so many matrices that lie one below the other, each of whole blocks."""
    fields_of = vars(kept.qparams).items()
    tensors = {name: tensor for name, tensor in fields_of if tensor is not None and tensor.ndim == 2}
    rows = zip(*(tensor.unflatten(0, (count, -1)).unbind() for tensor in tensors.values()), strict=True)
    values = kept.values.unflatten(0, (count, -1)).unbind()
    bits: list[Tensor | None] = [None] * count
    if kept.saturated is not None:
        bits = [*map(pack_bits, unpack_bits(kept.saturated, kept.values.numel()).chunk(count))]
    return [
        replace(
            kept,
            values=own,
            saturated=marked,
            qparams=replace(kept.qparams, **dict(zip(tensors, of, strict=True))),
        )
        for own, marked, of in zip(values, bits, rows, strict=True)
    ]


def pack_bits(bits: Tensor) -> Tensor:
    """Eight of 0 and 1 to a byte. Neighbours go to neighbouring bytes, which is what vector units like.

    >>> pack_bits(torch.tensor([1, 0, 0, 1], dtype=torch.uint8))
    tensor([9], dtype=torch.uint8)
    """
    planes = torch.nn.functional.pad(bits.reshape(-1), (0, -bits.numel() % 8)).view(8, -1)
    packed = planes[0].clone()
    for bit in range(1, 8):
        packed |= planes[bit] << bit
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` of them."""
    return torch.stack([(packed >> bit) & 1 for bit in range(8)]).reshape(-1)[:count]


def _pieces(x: Tensor, qparams: QParams, spec: QuantSpec) -> Iterator[tuple[slice, QParams]]:
    """Slices of rows, and the qparams of the blocks in them."""
    if x.device.type != "cpu" or x.numel() <= PIECE:
        yield slice(None), qparams
        return
    block = spec.granularity.rows
    count = max(1, PIECE // ((block or 1) * x.shape[1]))  # rows of blocks; or rows, which share all scales
    for start in range(0, x.shape[0] // (block or 1), count):
        rows = slice(start * (block or 1), (start + count) * (block or 1))
        yield rows, qparams if block is None else _of_rows(qparams, slice(start, start + count))


def _of_rows(qparams: QParams, rows: slice) -> QParams:
    held = {each.name: getattr(qparams, each.name) for each in fields(qparams)}
    return replace(qparams, **{k: v[rows] for k, v in held.items() if v is not None and v.ndim == 2})
