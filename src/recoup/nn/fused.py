"""When a linear layer runs as one function, and when as the equation that it is.

`numerics.kernels.linear` is faster and keeps less; it does not call the quantizers. So it runs only while
nobody listens to them, and `torch.compile`, which fuses the equation by itself, never meets it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.kept_input import kept_input
from recoup.nn.kept_weight import kept_weight
from recoup.numerics import LowRank, QParams
from recoup.numerics.kernels import KERNELS, Kept, linear, matrices


def fuses(x: Tensor, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> bool:
    """The layer's quantizers would do what `fused_linear` does, and nothing else; and there is an input."""
    return (
        type(weight_quantizer) is FakeQuantizer
        and weight_quantizer.impl != "reference"
        and _alone(weight_quantizer)
        and (type(input_quantizer) is nn.Identity or type(input_quantizer) is FakeQuantizer)
        and _alone(input_quantizer)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


def _alone(quantizer: nn.Module) -> bool:
    return getattr(quantizer, "enabled", True) and not listened_to(quantizer)


def listened_to(quantizer: nn.Module) -> bool:
    """Somebody has a hook on it, as `calibrate` has."""
    held = vars(quantizer)
    forward = held["_forward_hooks"] or held["_forward_pre_hooks"]
    return bool(forward or held["_backward_hooks"] or held["_backward_pre_hooks"])


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_quantizer: FakeQuantizer | nn.Identity,
    weight_quantizer: FakeQuantizer,
    low_rank: LowRank | None = None,
) -> Tensor:
    """F.linear(input_quantizer(x), weight_quantizer(weight + low_rank), bias), the same to the bit.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or none.
        input_quantizer: of x; an Identity leaves it in float.
        weight_quantizer: of the weight.
        low_rank: a product beside the weight, or none.

    Raises:
        NonFiniteError: x or the weight is not finite.
    """
    of_x = _of_input(input_quantizer, x)
    codes = kept_weight(weight_quantizer, weight, low_rank)
    learned = weight_quantizer.spec.ranges == "learned"
    of_weight = weight_quantizer.stored_qparams if learned else codes.qparams, codes
    return linear(x, of_x, weight, of_weight, bias, KERNELS[weight_quantizer.impl], low_rank)


def fused_matrices(
    stack: Tensor, view: Tensor, count: int, quantizer: FakeQuantizer
) -> list[tuple[Tensor, tuple[QParams, Kept]]]:
    """The matrices of a stack with their codes, which are decided once for a step, and a byte each.

    Args:
        stack: whose changes are noticed.
        view: its matrices, one below the other.
        count: how many those are.
        quantizer: of the stack.

    Raises:
        NonFiniteError: the stack is not finite.
    """
    codes = kept_weight(quantizer, stack, view=view)
    kept = matrices(codes, count)
    qparams = [each.qparams for each in kept]
    if quantizer.spec.ranges == "learned":  # with gradients, then
        qparams = [each.qparams for each in matrices(replace(codes, qparams=quantizer.stored_qparams), count)]
    return list(zip(view.unflatten(0, (count, -1)).unbind(), zip(qparams, kept, strict=True), strict=True))


def fused_matrix(
    x: Tensor,
    matrix: tuple[Tensor, tuple[QParams, Kept]],
    input_quantizer: FakeQuantizer | nn.Identity,
    weight_quantizer: FakeQuantizer,
) -> Tensor:
    """F.linear(input_quantizer(x), the rounded matrix), the same to the bit.

    Args:
        x: (..., in).
        matrix: one of `fused_matrices`.
        input_quantizer: of x; an Identity leaves it in float.
        weight_quantizer: of the stack.

    Raises:
        NonFiniteError: x is not finite.
    """
    weight, of_weight = matrix
    of_x = _of_input(input_quantizer, x)
    return linear(x, of_x, weight, of_weight, None, KERNELS[weight_quantizer.impl])


def _of_input(quantizer: FakeQuantizer | nn.Identity, x: Tensor) -> tuple[QParams, Kept] | None:
    if not isinstance(quantizer, FakeQuantizer):
        return None
    codes = kept_input(quantizer, x)
    learned = quantizer.spec.ranges == "learned"  # with gradients, then
    return quantizer.stored_qparams if learned else codes.qparams, codes
