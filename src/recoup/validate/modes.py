"""A model is measured as it ships: in training mode, or in float, the measurement is of something else."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from recoup.nn import FakeQuantizer

_DROP_PATHS = ("StochasticDepth", "DropPath")  # torchvision's, and what timm and transformers have


@contextmanager
def evaluation(model: nn.Module) -> Generator[None]:
    """Around a measurement: what behaves otherwise in training is in evaluation mode, and quantizers are on.

    It is asked when a module runs, so the code inside may call `model.eval()` itself. Never changes the
    model: a BatchNorm is caught before it moves its statistics.

    Raises:
        ValueError: from within the model's call: in training mode runs a BatchNorm, or what drops values or
            draws them at random: by its type, or by a float of its own with "drop" in its name that is
            above 0, as the modules have that call `torch.nn.functional.dropout` themselves; or a module runs
            with a quantizer that is off.

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
        module.register_forward_pre_hook(_refusal(name, why))
        for name, module in model.named_modules()
        if (why := moved_by_training(module)) is not None
    ]
    handles += [
        module.register_forward_pre_hook(_refuse_float)
        for module in model.modules()
        if any(isinstance(child, FakeQuantizer) for child in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moved_by_training(module: nn.Module) -> str | None:
    """Why a module must not be measured in training mode; None where it may."""
    if isinstance(module, _BatchNorm):
        return "its statistics come from the test batches and are moved by them"
    if isinstance(module, nn.RReLU):
        return "it draws its slopes at random in what is measured"
    return "it drops values at random from what is measured" if _drops(module) else None


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    whole = type(module).__name__ in _DROP_PATHS  # these call their share by many names
    shares = [value for name, value in vars(module).items() if whole or "drop" in name]
    return any(isinstance(share, float) and share > 0 for share in shares)


def _refuse_float(running: nn.Module, _: tuple[Any, ...]) -> None:
    for quantizer in running.children():
        if isinstance(quantizer, FakeQuantizer) and not quantizer.enabled:
            raise ValueError(
                f"{quantizer.path}: its quantizer is off, so what is measured is the float model; leave out "
                "quantization_off in evaluate, or set its enabled to True"
            )


def _refusal(name: str, why: str) -> Any:
    def refuse(running: nn.Module, _: tuple[Any, ...]) -> None:
        if running.training:
            raise ValueError(
                f"{name or 'the model'}: a {type(running).__name__} runs in training mode, so {why}; "
                "call model.eval() in evaluate"
            )

    return refuse
