"""To which experts tokens go, held still where two engines are compared.

A router's choice is a step: where two experts are nearly as likely, the last bit of an input decides, and the
token's output is another one. No bound on rounding covers that, so the engine is asked with the choices that
the trained model made. The routers themselves are compared bit for bit, as all that stays in float.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, ExpertsOfLinears, call

Routing = Mapping[str, Tensor]  # of every layer of experts: its name and ".index", its name and ".weights"
_PARTS = ("index", "weights")


@torch.no_grad()
def routing_of(model: nn.Module, example: Batch) -> dict[str, Tensor]:
    """The experts of every token of a batch, and their shares, in each layer of experts."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path, layer in _layers(model).items():

            def see(_: nn.Module, arguments: tuple[Any, ...], path: str = path) -> None:
                found.update(
                    {f"{path}.{part}": given for part, given in zip(_PARTS, arguments[1:], strict=True)}
                )

            hooks.callback(layer.register_forward_pre_hook(see).remove)
        if _layers(model):
            call(model, example)
    return found


@contextmanager
def routed(model: nn.Module, routing: Routing) -> Generator[None]:
    """The layers of experts that a routing knows are asked for these experts."""
    with ExitStack() as hooks:
        for path, layer in _layers(model).items():
            if f"{path}.index" in routing:
                chosen = tuple(routing[f"{path}.{part}"] for part in _PARTS)
                hook = layer.register_forward_pre_hook(lambda _, given, chosen=chosen: (given[0], *chosen))
                hooks.callback(hook.remove)
        yield


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, ExpertsOfLinears)}
