"""The BatchNorm of a layer, inside of its quantizer.

    training      y = gamma (z - mean of batch) / sigma of batch + beta, with z = (Q(k W) / k) x + b
    evaluation    y = Q(k W) x + k b + (beta - k running mean)

k = gamma / running sigma for every output channel, so Q(k W) is the weight that ships in both (Jacob et al.
2018, arXiv:1712.05877, section 3.2). In training mode a batch is normalised by its own statistics, and the
running ones move (the correction of Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2). Evaluation mode,
which freezes them, computes what `merge` leaves.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_FOLDED = "folded_norm"  # in a layer's `vars`, so that it is no part of the model


def norm_of(module: nn.Module) -> BatchNorm | None:
    """The norm inside of a quantized layer; None for a layer without one, float ones too."""
    norm = getattr(module, "batch_norm", None)
    return norm if isinstance(norm, BatchNorm) else None


def folded_norm(module: nn.Module) -> BatchNorm | None:
    """What a layer's norm was when it was folded into the layer; None where none was."""
    return vars(module).get(_FOLDED)


@torch.no_grad()
def remember(module: nn.Module, norm: BatchNorm) -> None:
    """Keep what normalises a layer's outputs, while its norm is being folded into it.

    Of the outputs the mean is beta, and the variance k^2 times that from before.

    Args:
        module: the layer.
        norm: as it was before.
    """
    assert norm.running_var is not None
    gamma: Tensor | float = norm.weight.double() if norm.affine else 1.0
    variance = norm.running_var.double() * gamma**2 / (norm.running_var.double() + norm.eps)
    found = type(norm)(norm.num_features, eps=norm.eps, momentum=norm.momentum).to(norm.running_var)
    assert found.running_mean is not None
    assert found.running_var is not None
    assert found.num_batches_tracked is not None
    found.running_var.copy_(variance)
    if norm.affine:
        found.bias.copy_(norm.bias)
        found.running_mean.copy_(norm.bias)
    if norm.num_batches_tracked is not None:
        found.num_batches_tracked.copy_(norm.num_batches_tracked)
    found.weight.requires_grad_(norm.affine and norm.weight.requires_grad)
    vars(module)[_FOLDED] = found


@torch.no_grad()
def attach(module: Any) -> None:
    """Put the norm that was folded into a quantized layer back, inside of its quantizer.

    k begins as exactly 1, so no code and no output of evaluation changes by a bit. Beta trains in place of
    the layer's bias, which is frozen.

    Args:
        module: with a `folded_norm`.
    """
    norm = copy.deepcopy(folded_norm(module))
    assert norm is not None
    norm.to(module.weight)
    assert norm.running_var is not None
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.requires_grad_(module.bias.requires_grad)
    module.bias.requires_grad_(False)
    module.batch_norm = norm.train(module.training)


@torch.no_grad()
def merge(module: Any) -> None:
    """W := k W and b := k b + (beta - k mean); the norm is gone then.

    Codes, and what the layer computes in evaluation mode, stay the same to the bit.

    Args:
        module: with a norm inside.
    """
    norm = module.batch_norm
    matrix, bias = module.matrix(module), folded_bias(module)
    module.weight.copy_(module.stored(matrix))
    module.bias.copy_(bias)
    module.bias.requires_grad_(norm.bias.requires_grad)
    remember(module, norm)
    del module.batch_norm
    module.batch_norm = None


def factor_of(norm: BatchNorm) -> Tensor:
    """k, for every channel."""
    assert norm.running_var is not None
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def folded(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight times k; the weight itself without a norm.

    Args:
        module: the layer.
        weight: its own, of which the first axis is the output channels.
    """
    norm = norm_of(module)
    return weight if norm is None else weight * _of_rows(factor_of(norm), weight)


def folded_bias(module: Any) -> Tensor | None:
    """The bias of evaluation, k b + (beta - k mean); b itself without a norm."""
    norm, bias = norm_of(module), module.bias
    if norm is None:
        return bias
    assert norm.running_mean is not None
    k = factor_of(norm)
    shift = norm.bias - k * norm.running_mean
    return shift if bias is None else k * bias + shift


def normalised(
    module: Any, seen: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """The output of a layer whose norm is in training mode.

    A channel with k = 0 returns beta and has no z of its own: there z is that of the float weight, so that
    its statistics, and the gradient of gamma, are those of the float layer.

    Args:
        module: the layer.
        seen: Q(k W).
        weight: W, in the same layout.
        compute: from a weight and a bias to the layer's sums.
    """
    k = _of_rows(factor_of(module.batch_norm), seen)
    dead = k == 0
    unscaled = torch.where(dead, weight, seen / torch.where(dead, 1, k))
    return module.batch_norm(compute(unscaled, module.bias))


def _of_rows(k: Tensor, weight: Tensor) -> Tensor:
    return k.reshape(-1, *[1] * (weight.ndim - 1))
