"""What export proves about a written artefact before anyone gets to see it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.nn import CodedConv, CodedEmbedding, CodedLinear, CodedModule, FakeQuantizer

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
        decoded: of a file that decodes: words that were compared with what the trained model generates.
        ties: how many of them differ, each no further from the trained one than rounding explains.
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
    decoded: int | None = None
    ties: int | None = None
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
        if self.decoded is not None:
            parts.append(f"{self.decoded} words decoded as generated, {self.ties} of them ties")
        if self.falls_back:
            parts.append(f"in floats: {len(self.falls_back)} (parity.json names them)")
        if self.engine is not None:
            parts.append(f"computed by {self.engine}")
        return "; ".join(parts)


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


def added(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """A sum of two tensors in float64, and how far it may be where each is scaled and added in float32."""
    x, other = x.double(), other.double()
    return x + other, 8 * _roundoff(torch.float32) * (x.abs() + other.abs()) + _TINY


def _product(module: CodedLinear | CodedConv, x: Tensor, matrix: Tensor) -> Tensor:
    """The module's sums of products, with this matrix as its weight."""
    if isinstance(module, CodedLinear):
        return x @ matrix.T
    return module.summed(x, matrix)


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
