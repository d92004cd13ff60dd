"""Where the error comes from: how far every quantized module is from its float self."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from recoup.nn import CODED_MODULES, Batch, call, device_of, evaluating, moved, quantization_off


@torch.no_grad()
def layer_errors(model: nn.Module, batch: Batch) -> dict[str, float]:
    """The relative error that quantization adds in every module, on the inputs it really gets.

    |y - y'| / |y'| in the Euclidean norm, of the first of several outputs, where y' is what the same module
    makes of the same input with its quantizers off. Errors of earlier modules are part of the input, so
    they do not count again.

    Args:
        model: prepared. Never changed.
        batch: one is enough; the error is a mean over all its positions.
    """
    errors: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], quantized: Any) -> None:
            before = dict(errors)
            with quantization_off(module):
                exact = module.forward(*args, **kwargs)
            errors.update(before)  # modules inside of it ran again, and were compared with themselves
            found, wanted = (cast(Tensor, y[0] if isinstance(y, tuple) else y) for y in (quantized, exact))
            norm = wanted.double().norm().clamp(min=torch.finfo(torch.float32).tiny)
            errors[name] = float((found.double() - wanted.double()).norm() / norm)

        return compare

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if type(module) in CODED_MODULES
    ]
    try:
        with evaluating(model):
            call(model, moved(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return errors
