"""What every quantized twin of a float module is made of: the float module's own state, and quantizers."""

import copy
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.schemes import Scheme

Module = TypeVar("Module", bound=nn.Module)
# "ids" are no numbers; "tokens" are (..., features), with a scale for each token or group of features where
# a scheme says so; "channels" are (N, C, ...), summed over channels and places at once, with one scale.
Inputs = Literal["ids", "tokens", "channels"]


class QuantModule(Protocol):
    """What `prepare`, `calibrate` and `convert` know of a quantized module."""

    inputs_are: ClassVar[Inputs]
    scheme: Scheme
    weight: Tensor
    weight_quantizer: FakeQuantizer

    @classmethod
    def from_float(cls, module: Any, scheme: Scheme, path: str) -> nn.Module:
        """The twin of a float module; it shares every Parameter."""
        ...

    @staticmethod
    def matrix(module: Any) -> Tensor:
        """The 2-D view of a float module's weight, (output features, input features)."""
        ...


def adopt(cls: type[Module], module: nn.Module, path: str) -> Module:
    """An instance of `cls` with all that `module` holds: the same Parameters, buffers, hooks and flags.

    Raises:
        ValueError: somebody replaced the module's forward, so the twin's would not be the same.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"{path}: its forward was replaced on the instance, as accelerate does for "
            "device_map and offloading; load the model without it"
        )
    twin = cls.__new__(cls)
    vars(twin).update(vars(module))
    # What the twin registers must not appear in the float module. Hooks stay shared: a handle taken before
    # must still remove its hook.
    for registered in ("_parameters", "_buffers", "_modules"):
        vars(twin)[registered] = copy.copy(vars(module)[registered])
    return twin


def weight_quantizer(weight: Tensor, scheme: Scheme, path: str) -> FakeQuantizer:
    """Of a weight's 2-D view. Round-to-nearest from the start: a weight needs no data to be calibrated.

    Raises:
        ValueError: the weight does not fit the scheme's blocks or is not finite.
    """
    quantizer = FakeQuantizer(scheme.weights, rows=weight.shape[0], columns=weight.shape[1])
    quantizer.path = f"{path}.weight"
    quantizer.to(weight.device)
    quantizer.fit(weight.detach())
    return quantizer


def input_quantizer(
    features: int | None, scheme: Scheme, path: str, device: torch.device
) -> FakeQuantizer | nn.Identity:
    """Of inputs with so many features; None for "channels". Nothing where the scheme leaves them in float."""
    if scheme.inputs is None:
        return nn.Identity()
    quantizer = FakeQuantizer(scheme.inputs, rows=None, columns=features)
    quantizer.path = f"{path}.input"
    return quantizer.to(device)
