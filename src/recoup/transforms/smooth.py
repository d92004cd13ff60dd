"""Channels of different sizes are made alike, before one scale has to do for many of them.

Layers that read channels x with the columns of W compute the same from x / s and W s, whatever s is. Where
x is what a norm, a value or one side of a gate multiplied last, the division goes into that module's
weight, and the model's function stays. The factors

    s_j = sqrt(rms(x_j) / rms(W_j))

give a channel and the columns that read it one size: large channels no longer decide the scale of the small
ones beside them, and columns that matter get finer steps. It is SmoothQuant's balance (Xiao et al. 2022,
arXiv:2211.10438, equation 4 with alpha 1/2), of root mean squares in place of maxima, which one token
decides.

Factors are powers of two. Multiplying by them rounds nothing, so the model returns the same bits as before;
and whether two modules can be balanced is not read off names: it is tried, and one bit that differs says no.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recoup.nn import (
    DEFAULT_SAMPLES,
    Batch,
    Codes,
    FakeQuantizer,
    call,
    cut,
    device_of,
    evaluating,
    moved,
    quant_type,
    size_of,
    take,
    weight_of,
    without_labels,
)
from recoup.progress import watched
from recoup.schemes import Plan
from recoup.transforms.fuse import tensors_of

_log = logging.getLogger("recoup")
_BEFORE = 4  # modules that ran last, any of which may make what the next one reads
_SAMPLES = 4  # with which a try is made
_PROBE = 8  # exponents of a try: so far that what saturates or bends is seen


@dataclass(frozen=True, kw_only=True)
class _Link:
    """Channels that one module makes, and others read.

    Args:
        maker: a norm or a linear layer.
        first: of its channels that are read; the last is the last it has.
        readers: linear layers with one input.
        channels: which of those every column of a reader is.
    """

    maker: nn.Module
    first: int
    readers: tuple[nn.Module, ...]
    channels: Int[Tensor, " columns"]

    @property
    def size(self) -> int:
        """The number of channels."""
        return _made(self.maker).shape[0] - self.first

    def scale(self, exponents: Int[Tensor, " channels"]) -> None:
        """Make every channel smaller by a power of two, and the columns that read it larger."""
        bias = cast(Tensor | None, getattr(self.maker, "bias", None))
        for state in (_made(self.maker), bias):
            if state is not None:
                rows = state[self.first :]
                rows.copy_(torch.ldexp(rows, -exponents.reshape(-1, *[1] * (rows.ndim - 1))))
        for reader in self.readers:
            columns = _matrix(reader)
            columns.copy_(torch.ldexp(columns, exponents[self.channels]))


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One input of linear layers, and the modules that may have made its channels, the likeliest first."""

    x: Float[Tensor, "... columns"]
    makers: list[tuple[nn.Module, int]]
    readers: list[nn.Module] = field(default_factory=list[nn.Module])


@torch.no_grad()
def smooth(
    model: nn.Module, plan: Plan, batches: Iterable[Batch], *, samples: int | None = None
) -> nn.Module:
    """Balance what quantized linear layers read with what made it; in place, returns the model.

    Balanced are channels that a norm, a linear layer or what follows one without bending it (a gate's
    product, attention's average of values, a ReLU) hands to linear layers alone. Channels that something else
    reads stay as they are. Never changes a bit of what the model computes; weights of norms and layers do
    change.

    Args:
        model: float.
        plan: of it; inputs of layers that it leaves in float are not balanced.
        batches: the sizes of channels are those that the model has on these.
        samples: how many to see; see `calibrate`.

    Raises:
        ValueError: a prepared model; no batches, fewer samples than asked, or weights in float16.

    >>> from recoup import resolve
    >>> model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8)), torch.randn(4, 32)
    >>> norm = model[0].weight.detach()
    >>> norm[3] = 64
    >>> y = model(x)
    >>> torch.equal(smooth(model, resolve(model, "w4a16"), [x])(x), y), float(norm[3] / norm[4])
    (True, 8.0)
    """
    if any(isinstance(module, (FakeQuantizer, Codes)) for module in model.modules()):
        raise ValueError("smooth: the model is prepared already; balance the float model, before prepare")
    asked = [without_labels(batch) for batch in take(batches, samples or DEFAULT_SAMPLES)]
    found = sum(map(size_of, asked))
    if found < (samples or 1):
        raise ValueError(f"smooth: {samples or 1} samples asked, {found} found; bring more, or ask for fewer")
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"{name}: float16 has too few exponents for factors of channels; call model.float() first"
            )
    taken = [moved(batch, device_of(model)) for batch in asked]
    with evaluating(model):
        links = _links(model, plan, cut(taken[0], _SAMPLES))
        squares = _squares(model, [link.readers[0] for link in links], taken)
    for link in links:
        link.scale(_exponents(link, squares[link.readers[0]]))
    return model


def _links(model: nn.Module, plan: Plan, example: Batch) -> list[_Link]:
    """All that can be balanced; what has the same place in every block is tried at once."""
    names = {module: name for name, module in model.named_modules()}
    places: dict[str, list[_Reading]] = defaultdict(list)
    for reading in _readings(model, example):
        readers = [names[reader] for reader in reading.readers]
        if any(reader in plan.modules for reader in readers):
            places[re.sub(r"\d+", "*", ", ".join(readers))].append(reading)
    before, links = list(tensors_of(call(model, example))), list[_Link]()
    for place, readings in watched(list(places.items()), "looking for channels to balance"):
        for tried in _tries(model, example, readings):
            if before and _same(model, example, tried, before):
                links += tried
                break
        else:
            _log.info("smooth: the input of %s stays as it is: something else reads or bends it", place)
    return links


def _readings(model: nn.Module, example: Batch) -> list[_Reading]:
    """The inputs of linear layers, in the order in which a pass reads them."""
    readings: dict[tuple[int, int], _Reading] = {}  # by identity, which a tensor that is held keeps
    ran: list[nn.Module] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_layer(module):
            x: Tensor = (*args, *kwargs.values())[0]
            key = id(x), x._version  # an operation in place makes another input of it
            if key not in readings:
                readings[key] = _Reading(x=x, makers=_makers(ran, x.shape[-1]))
            readings[key].readers.append(module)
        ran.append(module)

    with ExitStack() as hooks:
        for module in model.modules():
            if _is_layer(module) or _is_norm(module):
                hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        call(model, example)
    return list(readings.values())


def _makers(ran: Sequence[nn.Module], columns: int) -> list[tuple[nn.Module, int]]:
    """Modules whose outputs may be these columns, and the first of those; the one that ran last comes first.

    All outputs, each for one column or, as values that several queries share, for several; or the last of one
    matrix: the second side of a gate, or the values after queries and keys.
    """
    found: list[tuple[nn.Module, int]] = []
    for maker in reversed(ran[-_BEFORE:]):
        rows = _made(maker).shape[0]
        widths = (rows,) if rows <= columns else (columns, (rows - columns) // 2)
        found += [(maker, rows - width) for width in dict.fromkeys(widths) if width and columns % width == 0]
    return found


def _tries(model: nn.Module, example: Batch, readings: list[_Reading]) -> Iterator[list[_Link]]:
    """Who may have made the inputs at one place of every block; their makers are tried in one order."""
    for makers in zip(*(reading.makers for reading in readings), strict=False):
        channels = _channels(model, example, readings[0], *makers[0])
        links = {
            (maker, *reading.readers): _Link(
                maker=maker, first=first, readers=tuple(reading.readers), channels=channels
            )
            for reading, (maker, first) in zip(readings, makers, strict=True)
        }
        yield list(links.values())  # once each, where one block runs several times


def _channels(
    model: nn.Module, example: Batch, reading: _Reading, maker: nn.Module, first: int
) -> Int[Tensor, " columns"]:
    """Which of a maker's channels each column is: bit by bit of their numbers, half of them are halved."""
    columns = torch.arange(reading.x.shape[-1], device=reading.x.device)
    alone = _Link(maker=maker, first=first, readers=(), channels=columns)
    if alone.size == len(columns):
        return columns
    numbers, found = torch.arange(alone.size, device=columns.device), torch.zeros_like(columns)
    squares = reading.x.double().square().flatten(0, -2).sum(dim=0)
    for bit in range((alone.size - 1).bit_length()):
        with _scaled([alone], [numbers >> bit & 1]):
            halved = _squares(model, [reading.readers[0]], [example])[reading.readers[0]]
        found |= (halved < squares / 2).long() << bit  # a quarter, or all
    return found.clamp(max=alone.size - 1)


def _same(model: nn.Module, example: Batch, links: list[_Link], before: list[Tensor]) -> bool:
    """Does the model return the same bits when every channel has a factor of its own?"""
    drawn = torch.Generator().manual_seed(0)
    exponents = [torch.randint(-_PROBE, _PROBE + 1, (link.size,), generator=drawn) for link in links]
    with _scaled(links, [e.to(link.channels.device) for e, link in zip(exponents, links, strict=True)]):
        after = list(tensors_of(call(model, example)))
    return len(before) == len(after) and all(map(torch.equal, before, after))


@contextmanager
def _scaled(links: Sequence[_Link], exponents: Sequence[Tensor]) -> Generator[None]:
    """The model with these factors, which the end takes back; powers of two leave no trace."""
    for link, of_channels in zip(links, exponents, strict=True):
        link.scale(of_channels)
    try:
        yield
    finally:
        for link, of_channels in zip(links, exponents, strict=True):
            link.scale(-of_channels)


def _squares(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch]
) -> dict[nn.Module, Float[Tensor, " columns"]]:
    """The sums of squares of every channel that a layer reads, in float64."""
    found: dict[nn.Module, Any] = dict.fromkeys(layers, 0)

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (*args, *kwargs.values())[0]
        found[layer] = found[layer] + x.double().square().flatten(0, -2).sum(dim=0)

    with ExitStack() as hooks:
        for layer in found:
            hooks.callback(layer.register_forward_pre_hook(add, with_kwargs=True).remove)
        for batch in watched(batches, "measuring channels"):
            call(model, batch)
    return found


def _exponents(link: _Link, squares: Float[Tensor, " columns"]) -> Int[Tensor, " channels"]:
    """log2 of s, with a mean of 0; 0 for channels of which nothing is known, or which nothing reads."""
    read = sum(_matrix(reader).double().square().sum(dim=0) for reader in link.readers)
    of_inputs, of_weights = (
        torch.zeros(link.size, dtype=torch.float64, device=squares.device).index_add(0, link.channels, sums)
        for sums in (squares, cast(Tensor, read))
    )
    known = (of_inputs > 0) & (of_weights > 0)
    exponents = torch.where(known, (of_inputs / of_weights).log2() / 4, 0)
    return torch.where(known, exponents - exponents[known].mean(), 0).round().int()


def _is_layer(module: nn.Module) -> bool:
    kind = quant_type(module)
    return kind is not None and kind.inputs_are == "tokens"


def _is_norm(module: nn.Module) -> bool:
    """A weight for each channel, and at most a bias beside it."""
    own = dict(module.named_parameters())
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())


def _matrix(layer: nn.Module) -> Tensor:
    """The 2-D view of a linear layer's weight, (outputs, inputs)."""
    kind = quant_type(layer)
    assert kind is not None
    return weight_of(kind, layer, "weight").matrix


def _made(maker: nn.Module) -> Tensor:
    """The weight with an entry, or a row, for each channel that a module makes."""
    return _matrix(maker) if _is_layer(maker) else cast(Tensor, maker.weight)
