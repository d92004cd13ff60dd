"""What export proves about a written artefact before anyone gets to see it."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn import (
    Batch,
    CodedConv,
    CodedEmbedding,
    CodedLinear,
    CodedModule,
    FakeQuantizer,
    call,
    quantization_off,
)

Array = np.ndarray[Any, np.dtype[Any]]

_TINY = torch.finfo(torch.float32).tiny


class ParityError(RuntimeError):
    """The written artefact is not what was trained. Names the tensor or module; nothing is left on disk."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How closely an engine agrees with the trained model; every figure is from the written bytes.

    Args:
        modules: quantized modules compared.
        codes: codes read back, all equal to the trained ones.
        scales: scales read back, all equal, as are the zero points beside them.
        worst_module: the largest difference of a module's output, as a share of its bound; None where the
            engine shows no module's output.
        end_to_end: root mean square of the difference of the model's outputs, over that of the outputs.
        divergence: of a model that answers logits: the mean Kullback-Leibler divergence of the engine's next
            word (or class) from the trained model's, in nats; None where it is not asked.
        same_word: the share of places where both find the same word or class most likely; None likewise.
        engine: what computed it, where that is not the engine that the target is named for.
        falls_back: what is not multiplied in codes, by node or module: what it falls back to, and why.
    """

    modules: int
    codes: int
    scales: int
    worst_module: float | None
    end_to_end: float
    divergence: float | None = None
    same_word: float | None = None
    engine: str | None = None
    falls_back: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        parts = [
            f"{self.codes:,} codes and {self.scales:,} scales read back equal",
            f"{self.modules} modules",
        ]
        if self.worst_module is not None:
            parts[1] += f" within {self.worst_module:.0%} of their bound"
        parts.append(f"end to end {self.end_to_end:.1e} (relative, RMS)")
        if self.divergence is not None and self.same_word is not None:
            parts.append(f"next words {self.divergence:.1e} nats apart, {self.same_word:.0%} the same")
        if self.falls_back:
            parts.append(f"in floats: {len(self.falls_back)} (parity.json names them)")
        if self.engine is not None:
            parts.append(f"computed by {self.engine}")
        return "; ".join(parts)


def end_to_end(
    model: nn.Module,
    outputs: Any,
    example: Batch,
    *,
    engine: str,
    lattices: int = 1,
    weight_roundoff: float = 0.0,
) -> float:
    """How far an engine's outputs are from the trained model's (relative, RMS).

    Two things make two correct engines differ. Rounding errors of sums: `_shaken`. And, where inputs are
    quantized, a rounding error that flips a code: every later code of that token may then fall the other
    way, until the two runs are as far apart as if one of them rounded at random. That is at most what
    quantizing the inputs changes at all, so that is the allowance for it.

    Args:
        model: converted.
        outputs: the engine's.
        example: the batch that they are for.
        engine: its name.
        lattices: 2 if the engine derives the scales of inputs in another way: then both lattices are as far
            from float inputs as one is.
        weight_roundoff: relative rounding error of the weights that the engine holds.

    Raises:
        ParityError: it is more than that explains.
    """
    trained = call(model, example)
    with quantization_off(model):
        plain = call(model, example)
        with _shaken(model, weight_roundoff):
            rounding = relative_rms(plain, call(model, example))
    drift = relative_rms(trained, outputs)
    allowed = 3 * rounding + lattices * relative_rms(trained, plain)
    if not drift <= allowed:
        raise ParityError(
            f"in {engine} the outputs differ from the trained model's by {drift:.3g} (relative, RMS); "
            f"rounding explains {allowed:.3g}"
        )
    return drift


def divergence(
    model: nn.Module,
    outputs: Tensor,
    example: Batch,
    *,
    engine: str,
    lattices: int = 1,
    weight_roundoff: float = 0.0,
) -> tuple[float, float]:
    """How far an engine's next words are from the trained model's: mean nats, and the share of same words.

    The divergence KL(p, q) is half the squared length of the difference of log-probabilities, measured by p's
    own variance, up to third order. So its root adds up as the differences that `end_to_end` allows do, and
    is allowed the same: three times the root of what rounding does, and once (for two lattices twice) that of
    what quantizing inputs does.

    Over many places a mean hides a few words that are plainly wrong. So another most likely word is allowed
    only where the trained model finds it nearly as likely: where the divergence that such a change takes at
    the least (`flip_nats`) is no more than the same sum explains at one place, with what rounding and what
    quantizing inputs do at the place where they do most.

    Args:
        model: converted; it answers log-probabilities (samples, tokens, words).
        outputs: the engine's.
        example: the batch that they are for.
        engine: its name.
        lattices: see `end_to_end`.
        weight_roundoff: likewise.

    Raises:
        ParityError: it is more than that explains, or a word is another one that is not.
    """
    trained = call(model, example)
    with quantization_off(model):
        plain = call(model, example)
        with _shaken(model, weight_roundoff):
            rounding = _nats(plain, call(model, example))
    found, inputs = _nats(trained, outputs), _nats(trained, plain)
    allowed, most = (
        (3 * float(of_rounding) ** 0.5 + lattices * float(of_inputs) ** 0.5) ** 2
        for of_rounding, of_inputs in ((rounding.mean(), inputs.mean()), (rounding.max(), inputs.max()))
    )
    mean = float(found.mean())
    if not mean <= allowed:
        raise ParityError(
            f"in {engine} the next words are {mean:.3g} nats from the trained model's; rounding explains "
            f"{allowed:.3g}"
        )
    words, right = outputs.argmax(dim=-1), trained.argmax(dim=-1)
    taken = flip_nats(trained, words)
    if not bool((taken <= most).all()):
        place = tuple(map(int, (taken == taken.max()).nonzero()[0]))
        raise ParityError(
            f"in {engine} the most likely word at {place} is {int(words[place])}, trained is "
            f"{int(right[place])}: that takes {float(taken.max()):.3g} nats there, rounding explains "
            f"{most:.3g}"
        )
    return mean, float((words == right).double().mean())


def flip_nats(reference: Tensor, words: Tensor) -> Tensor:
    """The least divergence KL(p, q) with which a word is as likely in q as p's most likely one.

    Of all q in which two words of probabilities P and Q have equal ones, the nearest gives both (P + Q) / 2
    and leaves the others as they are (the minimum of a sum -p log q with sum(q) = 1), so it is at
    P log(2 P / (P + Q)) + Q log(2 Q / (P + Q)).

    Args:
        reference: log-probabilities, or logits (..., words).
        words: the other word at every place (...).

    >>> import torch
    >>> places = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log()
    >>> [round(float(nats), 3) for nats in flip_nats(places, torch.tensor([1, 1]))]
    [0.0, 0.368]
    """
    p = reference.double().softmax(dim=-1)
    most, other = p.amax(dim=-1), p.gather(-1, words[..., None])[..., 0]
    gap = (most - other) / (most + other)
    # with P, Q = (1 + gap) / 2, (1 - gap) / 2 of their sum: nothing cancels for a small gap
    return (most + other) / 2 * (torch.special.xlog1py(1 + gap, gap) + torch.special.xlog1py(1 - gap, -gap))


def _nats(reference: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities (..., words) at every place."""
    p, q = reference.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
    # with sum(p) = sum(q): no term is negative, so tiny differences do not cancel
    return (p.exp() * (torch.expm1(q - p) - (q - p))).sum(dim=-1)


def relative_rms(reference: Any, other: Any) -> float:
    """Root mean square of the difference of two models' outputs, over that of the first."""
    pairs = list(zip(_tensors(reference), _tensors(other), strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (difference / max(sum(float(a.double().square().sum()) for a, _ in pairs), _TINY)) ** 0.5


def equal(path: str, what: str, found: Array, trained: Tensor) -> None:
    """What was read back is what was trained.

    Raises:
        ParityError: it is not; names the first place.
    """
    right = trained.cpu().numpy()
    if found.shape != right.shape or not np.array_equal(found, right):
        where = "its shape" if found.shape != right.shape else tuple(map(int, np.argwhere(found != right)[0]))
        raise ParityError(
            f"{path}: the {what} read back from the file differ from the trained ones at {where}"
        )


def expected(module: CodedModule | FakeQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """A module's output in float64, and how far an engine with float32 arithmetic may be from it.

    With u = 2^-24, K products and one bias: a sum of K + 1 float32 terms in any order is off by at most
    (K + 1) u times the sum of magnitudes (Higham 2002, section 4.2); scaling adds a few more roundings. An
    input that lies within rounding error of a tie between two codes may go to either: one step of it. Where
    the model computes in a narrower type, the input, the weight and the output are each rounded to it: three
    roundings, and a fourth for what they do to each other. Of a quantized output only ties are left.
    """
    if isinstance(module, FakeQuantizer):
        return module(x).double(), _ties(module, x).double() + _TINY
    weight = module.weight.decode().double()
    if isinstance(module, CodedEmbedding):
        y = torch.nn.functional.embedding(x, weight)
        return y, y.abs() * _roundoff(module.weight.dtype) + _TINY
    assert isinstance(module, CodedLinear | CodedConv)
    seen, slack = module.input_quantizer(x).double(), _ties(module.input_quantizer, x).double()
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias
    bias = bias.double().reshape(-1, *[1] * (len(module.kernel_size) if isinstance(module, CodedConv) else 0))
    magnitude = _product(module, seen.abs(), weight.abs()) + bias.abs()
    narrow = 0.0 if module.weight.dtype == torch.float32 else 4 * _roundoff(module.weight.dtype)
    roundings = (weight.shape[1] + 8) * _roundoff(torch.float32) + narrow
    bound = roundings * magnitude + _product(module, slack, weight.abs())
    return _product(module, seen, weight) + bias, bound + _TINY


def _product(module: CodedLinear | CodedConv, x: Tensor, matrix: Tensor) -> Tensor:
    """The module's sums of products, with this matrix as its weight."""
    if isinstance(module, CodedLinear):
        return x @ matrix.T
    weight, stride, dilation, groups = (
        matrix.unflatten(1, (-1, *module.kernel_size)), module.stride, module.dilation, module.groups,
    )  # fmt: skip
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return module.convolution(F.pad(x, module.edges, mode), weight, None, stride, 0, dilation, groups)


def _ties(quantizer: nn.Module, x: Tensor) -> Tensor:
    """By how much each quantized input may differ because its code is undecided in float32."""
    if not isinstance(quantizer, FakeQuantizer):
        return torch.zeros_like(x)
    view = quantizer.view(x)
    step = quantizer.qparams(view).step
    step = step.repeat_interleave(view.shape[0] // step.shape[0], 0).repeat_interleave(
        view.shape[1] // step.shape[1], 1
    )
    position = (view / step).abs()
    undecided = (position - position.floor() - 0.5).abs() <= 4 * 2**-24 * position.clamp(min=1)
    return (undecided * step.abs()).reshape(x.shape)


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@contextmanager
def _shaken(model: nn.Module, weight_roundoff: float) -> Generator[None]:
    """Noise on the input of every quantized module, of the size of the rounding error of a sum.

    That is 2^-24 sqrt(K) times the input's RMS for a sum of K terms (Higham 2002, section 4.2); a relative
    error of every weight does what the same error of every input does.
    """
    noise = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert isinstance(module, CodedLinear | CodedConv)
        x, terms = inputs[0], module.weight.codes.shape[1]
        size = 2**-24 * terms**0.5 * x.square().mean().sqrt() + weight_roundoff * x.abs()
        return ((x + size * torch.randn(x.shape, generator=noise)).to(x.dtype), *inputs[1:])

    sums = [module for module in model.modules() if isinstance(module, CodedLinear | CodedConv)]
    handles = [module.register_forward_pre_hook(shake) for module in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]  # a language model also returns its cache
