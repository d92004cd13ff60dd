"""Which parameters an optimizer gets, and how each kind is treated."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from recoup.nn import FakeQuantizer


def param_groups(
    model: nn.Module, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The groups for an optimizer: weights with decay, biases and norms without, what quantizers learn apart.

    The last one has "ranges": True, so that a schedule can tell it from the others.

    Args:
        model: prepared.
        lr: of everything but the scales.
        scale_lr: of learned scales and offsets; `lr` where None.
        weight_decay: of tensors with two or more dimensions that are no scales.

    >>> import torch
    >>> groups = param_groups(torch.nn.Sequential(torch.nn.Linear(4, 4)), lr=1e-3, weight_decay=0.1)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.1), (1, 0.0)]
    """
    scales = {id(parameter) for parameter in _scales(model).values()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [parameter for parameter in trainable if id(parameter) not in scales]
    groups = [
        {
            "params": [p for p in others if p.ndim >= 2],
            "lr": lr,
            "weight_decay": weight_decay,
            "ranges": False,
        },
        {"params": [p for p in others if p.ndim < 2], "lr": lr, "weight_decay": 0.0, "ranges": False},
        {
            "params": [p for p in trainable if id(p) in scales],
            "lr": scale_lr or lr,
            "weight_decay": 0.0,
            "ranges": True,
        },
    ]
    return [group for group in groups if group["params"]]


def check_scales_are_trained(model: nn.Module, optimizer: Optimizer) -> None:
    """An optimizer made before `prepare` knows nothing of learned scales.

    Raises:
        ValueError: a trainable scale is in none of its groups.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    forgotten = [name for name, parameter in _scales(model).items() if id(parameter) not in known]
    if forgotten:
        raise ValueError(
            f"{forgotten[0]} and {len(forgotten) - 1} more learned scales are in no group of the optimizer; "
            "make it from recoup.param_groups(model, lr) after prepare"
        )


def _scales(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{leaf}": parameter
        for name, quantizer in model.named_modules()
        if isinstance(quantizer, FakeQuantizer)
        for leaf, parameter in quantizer.named_parameters()
        if parameter.requires_grad
    }
