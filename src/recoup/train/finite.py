"""Where a NaN comes from."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, NonFiniteError, call, device_of, moved
from recoup.validate.symptoms import Symptom

_THE_LOSS = "the loss itself (every module's output is finite)"


class NonFiniteLossError(RuntimeError):
    """Training met a loss or gradient that is not finite; the message names the first module with one."""


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, batch: Batch) -> str:
    """The first module, in the order of execution, whose parameters or output hold a non-finite value.

    Or the first tensor that is to be quantized and holds one, by its own name. Runs the model once more on
    the batch. Never changes it.
    """
    found: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            del inputs
            for parameter, tensor in module.named_parameters(recurse=False):
                if not found and not torch.isfinite(tensor).all():
                    found.append(f"{name} (its {parameter})")
            if not found and not all(torch.isfinite(tensor).all() for tensor in _floats(output)):
                found.append(f"{name} (its output)")

        return check

    handles = [
        module.register_forward_hook(hook(name or "the model")) for name, module in model.named_modules()
    ]
    try:
        call(model, batch)
    except NonFiniteError as error:
        found.append(error.tensor)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else _THE_LOSS


def nonfinite_held_out(model: nn.Module, batches: Sequence[Batch]) -> Symptom:
    """A held-out loss that is no number, which training survives; runs the model until it finds where."""
    found = (first_nonfinite_module(model, moved(batch, device_of(model))) for batch in batches)
    return Symptom(
        module=next((place for place in found if place != _THE_LOSS), _THE_LOSS),
        what="not finite",
        figure="the held-out loss is not finite, so this step is not chosen",
        remedy="lower train.learning_rate; if it is so from the start, look at the held-out batches",
    )


def first_nonfinite_gradient(model: nn.Module) -> str:
    """Where gradients stop being finite: the last such parameter, because gradients flow backwards."""
    found = [
        name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    return found[-1] if found else "the sum over all parameters"


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _floats(value)
