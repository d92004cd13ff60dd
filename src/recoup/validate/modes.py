"""A model is measured in evaluation mode: in training mode the measurement is of something else."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]


@contextmanager
def evaluation(model: nn.Module) -> Generator[None]:
    """Around a measurement: what behaves otherwise in training must not run in training mode.

    It is asked when a module runs, so the code inside may call `model.eval()` itself. Never changes the
    model: a BatchNorm is caught before it moves its statistics.

    Raises:
        ValueError: from within the model's call: a BatchNorm, or a Dropout with p > 0, runs in training mode.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    >>> with evaluation(model):
    ...     y = model.eval()(torch.zeros(1, 4))
    >>> with evaluation(model):
    ...     y = model.train()(torch.zeros(1, 4))
    Traceback (most recent call last):
    ValueError: 1: a Dropout runs in training mode, so it drops values at random from what is measured;
    call model.eval() in evaluate
    """
    handles = [
        module.register_forward_pre_hook(_refusal(name, module))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refusal(name: str, module: nn.Module) -> Any:
    why = (
        "its statistics come from the test batches and are moved by them"
        if isinstance(module, _BatchNorm)
        else "it drops values at random from what is measured"
    )

    def refuse(running: nn.Module, _: tuple[Any, ...]) -> None:
        if running.training:
            raise ValueError(
                f"{name or 'the model'}: a {type(running).__name__} runs in training mode, so {why}; "
                "call model.eval() in evaluate"
            )

    return refuse
