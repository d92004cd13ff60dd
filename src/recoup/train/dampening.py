"""Weights that oscillate between two codes are held back (Nagel et al. 2022, arXiv:2203.11086, section 4.1).

Straight-through gradients push a weight over the threshold between two codes and back again, at every step,
and where it ends is chance. The penalty |Q(w) - clip(w)|^2 pulls it to the middle of the code that it has.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recoup.nn import FakeQuantizer, is_prepared, matrices_of, quantizers_of
from recoup.numerics.granularity import cut, spread


def dampen(model: nn.Module, strength: float) -> None:
    """Add the gradient of strength * sum |Q(w) - clip(w)|^2 to that of every weight that has one.

    It pulls nothing of the ranges, nor what lies outside of them. The gradients are added to what a backward
    pass left, on every process of a training alike.

    Args:
        model: prepared and calibrated, after a backward pass.
        strength: the weight of the penalty; the paper takes 1e-6 to 1e-2, rising from 0.
    """
    for weight, matrix, quantizer in _weights(model):
        (grad,) = torch.autograd.grad(strength * oscillation(matrix, quantizer), weight)
        assert weight.grad is not None, "asked before"
        weight.grad.add_(grad)


def oscillation(matrix: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """Sum of |Q(w) - clip(w)|^2, with a gradient for w alone.

    Args:
        matrix: the 2-D view of a weight.
        quantizer: its own.
    """
    spec = quantizer.spec
    with torch.no_grad():
        qparams, rounded = quantizer.qparams(matrix), quantizer(matrix)
        zero_point = 0 if qparams.zero_point is None else qparams.zero_point
        offset = 0 if qparams.offset is None else qparams.offset
        ends = [
            spread((end - zero_point) * qparams.step + offset) for end in (spec.format.lo, spec.format.hi)
        ]
    lo, hi = torch.minimum(*ends), torch.maximum(*ends)  # a scale may be negative
    clipped = cut(matrix.float(), spec.granularity).clamp(lo, hi)
    return (cut(rounded.float(), spec.granularity) - clipped).square().sum()


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, FakeQuantizer]]:
    """Every quantized weight with a gradient, once, with its 2-D view and its quantizer."""
    seen: set[Tensor] = set()
    for module in model.modules():
        for name, matrix in matrices_of(module).items() if is_prepared(module) else ():
            weight: Tensor = getattr(module, name)
            if weight.grad is not None and weight not in seen:
                seen.add(weight)
                yield weight, matrix, quantizers_of(module)[name]
