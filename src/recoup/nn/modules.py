"""The float modules' quantized twins, for calibration and training.

Each holds the float module's own Parameters, so optimizers made earlier keep working and tied weights
stay tied, and a fake quantizer for every tensor that its scheme names. Its forward is the equation.
"""

import copy
import sys
from typing import Any, ClassVar, Protocol, Self, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.numerics import extrema
from recoup.schemes import Scheme

Module = TypeVar("Module", bound=nn.Module)


class QuantModule(Protocol):
    """What `prepare`, `calibrate` and `convert` know of a quantized module."""

    has_float_inputs: ClassVar[bool]
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


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b."""

    has_float_inputs: ClassVar[bool] = True
    scheme: Scheme
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | nn.Identity

    @classmethod
    def from_float(cls, module: nn.Linear, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter.

        Args:
            module: what is replaced.
            scheme: the specs of its weight and input.
            path: its name in the model, for messages.

        Raises:
            ValueError: the weight does not fit the scheme's blocks or is not finite.
        """
        twin = _adopt(cls, module, path)
        twin.scheme = scheme
        twin.weight_quantizer = _weight_quantizer(cls.matrix(module), scheme, path)
        twin.input_quantizer = _input_quantizer(module.in_features, scheme, path).to(module.weight.device)
        return twin

    @staticmethod
    def matrix(module: nn.Linear) -> Tensor:
        """The weight itself."""
        return module.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantEmbedding(nn.Embedding):
    """y = Q(W)[ids]."""

    has_float_inputs: ClassVar[bool] = False
    scheme: Scheme
    weight_quantizer: FakeQuantizer

    @classmethod
    def from_float(cls, module: nn.Embedding, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares the weight. See `QuantLinear.from_float`.

        Raises:
            ValueError: also for `max_norm`, which changes the weight during the forward pass, and for
                sparse gradients, which rounding does not pass on.
        """
        if module.max_norm is not None:
            raise ValueError(
                f"{path}: an embedding with max_norm rescales its weight as it runs; keep it in float"
            )
        if module.sparse:
            raise ValueError(f"{path}: an embedding with sparse gradients asked; build it with sparse=False")
        twin = _adopt(cls, module, path)
        twin.scheme = scheme
        twin.weight_quantizer = _weight_quantizer(cls.matrix(module), scheme, path)
        return twin

    @staticmethod
    def matrix(module: nn.Embedding) -> Tensor:
        """The weight itself: a row is the vector of one id."""
        return module.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        weight = self.weight_quantizer(self.weight)
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


# Keys are names, so that a type from an optional package needs no import here.
QUANT_MODULES: dict[str, type[QuantModule]] = {
    "torch.nn.Linear": QuantLinear,
    "torch.nn.Embedding": QuantEmbedding,
}


def is_prepared(module: nn.Module) -> TypeGuard[QuantModule]:
    """A quantized twin.

    Not isinstance of the protocol: from Python 3.12 on that does not see Parameters.
    """
    return type(module) in QUANT_MODULES.values()


def quant_type(module: nn.Module) -> type[QuantModule] | None:
    """The twin's type for exactly this type of module, with a weight of its own.

    Subclasses are excluded: they may compute anything. So are weights that are computed from other
    parameters, as by weight_norm and pruning.
    """
    for name, twin in QUANT_MODULES.items():
        package, _, attribute = name.rpartition(".")
        if type(module) is getattr(sys.modules.get(package), attribute, None):
            return twin if isinstance(module.weight, nn.Parameter) else None
    return None


def _adopt(cls: type[Module], module: nn.Module, path: str) -> Module:
    """An instance of `cls` with all that `module` holds: the same Parameters, buffers, hooks and flags."""
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


def _weight_quantizer(weight: Tensor, scheme: Scheme, path: str) -> FakeQuantizer:
    """Round-to-nearest from the start: a weight needs no data to be calibrated."""
    quantizer = FakeQuantizer(scheme.weights, rows=weight.shape[0], columns=weight.shape[1])
    quantizer.path = f"{path}.weight"
    quantizer.to(weight.device)
    with torch.no_grad():
        quantizer.set_range(*extrema(weight, scheme.weights.granularity))
    return quantizer


def _input_quantizer(features: int, scheme: Scheme, path: str) -> FakeQuantizer | nn.Identity:
    if scheme.inputs is None:
        return nn.Identity()
    quantizer = FakeQuantizer(scheme.inputs, rows=None, columns=features)
    quantizer.path = f"{path}.input"
    return quantizer
