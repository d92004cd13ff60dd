"""What a trained model answers to a batch, and how far from it an engine's answers may be.

Two things make two correct engines differ. Rounding errors of sums: `shaken`. And, where inputs are
quantized, a rounding error that flips a code: every later code of that token may then fall the other way,
until the two runs are as far apart as if one of them rounded at random. That is at most what quantizing the
inputs changes at all, so that is the allowance for it.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.export.parity import ParityError
from recoup.nn import Batch, CodedConv, CodedLinear, call, quantization_off

WORDS = "logits"
_TINY = torch.finfo(torch.float32).tiny
_RECORDED_BYTES = 2**22


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an engine's answers are from the trained model's.

    Args:
        drift: root mean square of the difference, over that of the answers.
        nats: mean Kullback-Leibler divergence of the next word (or class); None where no output is `logits`.
        same_word: the share of places where both find the same most likely; None likewise.
    """

    drift: float
    nats: float | None = None
    same_word: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The trained model's outputs, and what rounding explains of an engine's difference from them.

    Args:
        values: outputs (rows, last axis) by name, in their order.
        allowed: difference, as `Agreement.drift`.
        allowed_nats: likewise as `Agreement.nats`; None where the outputs are no logits.
        allowed_flip: the most that another most likely word may take at one place, see `flip_nats`; None
            likewise, and in folders that were written before it was asked.
        every: which rows these are: every so many of the output's own.
    """

    values: Mapping[str, Tensor]
    allowed: float
    allowed_nats: float | None
    allowed_flip: float | None = None
    every: int = 1

    def agree(self, outputs: Any, engine: str) -> Agreement:
        """How far an engine's outputs are from these.

        Raises:
            ParityError: it is more than rounding explains, or they are other outputs.
        """
        found = named_rows(outputs, self.every)
        if [value.shape for value in found.values()] != [value.shape for value in self.values.values()]:
            raise ParityError(f"in {engine} the outputs have other shapes than the trained model's")
        drift = relative_rms(self.values, found)
        if not drift <= self.allowed:
            raise ParityError(
                f"in {engine} the outputs differ from the trained model's by {drift:.3g} (relative, RMS); "
                f"rounding explains {self.allowed:.3g}"
            )
        if self.allowed_nats is None:
            return Agreement(drift=drift)
        trained, words = self.values[WORDS], found[WORDS]
        distance = float(nats(trained, words).mean())
        if not distance <= self.allowed_nats:
            raise ParityError(
                f"in {engine} the next words are {distance:.3g} nats from the trained model's; rounding "
                f"explains {self.allowed_nats:.3g}"
            )
        self._check_flips(trained, words, engine)
        return Agreement(drift=drift, nats=distance, same_word=same_word(trained, words))

    def _check_flips(self, trained: Tensor, words: Tensor, engine: str) -> None:
        """Over many places a mean hides a few words that are plainly wrong: they are looked at one by one."""
        found, right = words.argmax(dim=-1), trained.argmax(dim=-1)
        taken = flip_nats(trained, found)
        if self.allowed_flip is not None and not bool((taken <= self.allowed_flip).all()):
            row = int(taken.argmax())
            raise ParityError(
                f"in {engine} the most likely word at place {row * self.every} is {int(found[row])}, trained "
                f"is {int(right[row])}: that takes {float(taken[row]):.3g} nats there, rounding explains "
                f"{self.allowed_flip:.3g}"
            )


@torch.no_grad()
def answers(
    model: nn.Module,
    example: Batch,
    *,
    lattices: int = 1,
    weight_roundoff: float = 0.0,
) -> tuple[Answers, Answers]:
    """What a converted model answers, and the part of it that is small enough to be kept in a folder.

    Where an output is called `logits`, it is of next words or classes, and their divergence is compared, too.

    Args:
        model: converted.
        example: the batch.
        lattices: 2 if the engine derives the scales of inputs in another way: then both lattices are as far
            from float inputs as one is.
        weight_roundoff: relative rounding error of the weights that the engine holds.
    """
    trained = call(model, example)
    with quantization_off(model):
        plain = call(model, example)
        with shaken(model, weight_roundoff):
            noisily = call(model, example)
    size = sum(value.nbytes for value in named_rows(trained).values())

    def of(every: int) -> Answers:
        values, others, noisy = (named_rows(outputs, every) for outputs in (trained, plain, noisily))
        allowed = 3 * relative_rms(others, noisy) + lattices * relative_rms(values, others)
        allowed_nats = allowed_flip = None
        if WORDS in values:
            # The divergence KL(p, q) is half the squared length of the difference of log-probabilities,
            # measured by p's own variance, up to third order: so its root adds up as differences do.
            # At one place it may be what both do at the place where they do most.
            rounding, inputs = nats(others[WORDS], noisy[WORDS]), nats(values[WORDS], others[WORDS])
            allowed_nats, allowed_flip = (
                (3 * float(both[0]) ** 0.5 + lattices * float(both[1]) ** 0.5) ** 2
                for both in ((rounding.mean(), inputs.mean()), (rounding.max(), inputs.max()))
            )
        return Answers(
            values=values, allowed=allowed, allowed_nats=allowed_nats, allowed_flip=allowed_flip, every=every
        )

    return of(1), of(max(1, -(-size // _RECORDED_BYTES)))


def named_rows(outputs: Any, every: int = 1) -> dict[str, Tensor]:
    """The tensors among a model's outputs as (rows, last axis), every so many rows; "" names a bare one.

    >>> {name: tuple(rows.shape) for name, rows in named_rows({"logits": torch.zeros(2, 5, 7)}, 3).items()}
    {'logits': (4, 7)}
    """
    if isinstance(outputs, Tensor):
        found: Mapping[str, Any] = {"": outputs}
    elif isinstance(outputs, Mapping):
        found = outputs
    else:
        found = {str(place): value for place, value in enumerate(outputs)}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}  # no caches
    return {n: v.reshape(-1, v.shape[-1] if v.ndim else 1)[::every] for n, v in tensors.items()}


def relative_rms(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Root mean square of the difference of two models' outputs, by place, over that of the first."""
    pairs = list(zip(reference.values(), other.values(), strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (difference / max(sum(float(a.double().square().sum()) for a, _ in pairs), _TINY)) ** 0.5


def nats(reference: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of logits, or log-probabilities (..., words), at every place."""
    p, q = reference.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
    # with sum(p) = sum(q): no term is negative, so tiny differences do not cancel
    return (p.exp() * (torch.expm1(q - p) - (q - p))).sum(dim=-1)


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


def same_word(reference: Tensor, other: Tensor) -> float:
    """The share of places where both have the same largest logit."""
    return float((reference.argmax(dim=-1) == other.argmax(dim=-1)).double().mean())


@contextmanager
def shaken(model: nn.Module, weight_roundoff: float = 0.0) -> Generator[None]:
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
