"""What every quantized twin of a float module is made of: the float module's own state, and quantizers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from recoup.nn.batch_norm import norm_of, normalised
from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.integer_bias import seen_bias
from recoup.numerics import QuantSpec
from recoup.schemes import Scheme

Module = TypeVar("Module", bound=nn.Module)
# "ids" are no numbers; "tokens" are (..., features), with a scale for each token or group of features where
# a scheme says so; "channels" are (N, C, ...), summed over channels and places at once, with one scale;
# "routed" are tokens of which every expert sees its own; "steps" are joined by a state that stays in float;
# "unseen" are made of the module's arguments by a forward of its own.
Inputs = Literal["ids", "tokens", "channels", "routed", "steps", "unseen"]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The 2-D view of one weight: a matrix, or several of one shape, one below the other.

    Args:
        matrix: (output features, input features).
        rows: of one matrix. No block of scales reaches into the next, and "per tensor" is for each.
    """

    matrix: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of one matrix."""
        return self.rows, self.matrix.shape[1]


class QuantModule(Protocol):
    """What `prepare`, `calibrate` and `convert` know of every quantized module.

    The quantizer of the Parameter `name` is its child `name_quantizer`.
    """

    inputs_are: ClassVar[Inputs]
    scheme: Scheme

    @classmethod
    def from_float(cls, module: Any, scheme: Scheme, path: str) -> nn.Module:
        """The twin of a float module; it shares every Parameter."""
        ...


class OneWeight(QuantModule, Protocol):
    """A quantized module whose only weight is called `weight`."""

    weight: Tensor
    weight_quantizer: FakeQuantizer

    @staticmethod
    def matrix(module: Any) -> Tensor:
        """The 2-D view of a float module's weight, (output features, input features)."""
        ...


class SeveralWeights(QuantModule, Protocol):
    """A quantized module with weights of other names."""

    @staticmethod
    def check(module: Any, scheme: Scheme, path: str) -> None:
        """Refuse, in a `ValueError`, a float module or a scheme that the twin cannot compute."""
        ...

    @staticmethod
    def names(module: Any) -> tuple[str, ...]:
        """The names of the Parameters of a float module that are its weights."""
        ...

    @staticmethod
    def view(module: Any, name: str) -> Weight:
        """The 2-D view of a float module's weight of that name."""
        ...


def weight_names(kind: type[QuantModule], module: Any) -> tuple[str, ...]:
    """The names of the Parameters that are the weights of a module, float or prepared.

    Args:
        kind: of its twin.
        module: whose they are.
    """
    return kind.names(module) if has_several(kind) else ("weight",)


def weight_of(kind: type[QuantModule], module: Any, name: str) -> Weight:
    """The 2-D view of a weight of a module, float or prepared.

    Args:
        kind: of its twin.
        module: whose it is.
        name: of `weight_names`.
    """
    if has_several(kind):
        return kind.view(module, name)
    matrix = cast(type[OneWeight], kind).matrix(module)
    return Weight(matrix=matrix, rows=matrix.shape[0])


def has_several(kind: type[QuantModule]) -> TypeGuard[type[SeveralWeights]]:
    """A twin that says itself what its weights are called."""
    return hasattr(kind, "names")


def quantizers_of(prepared: Any) -> dict[str, FakeQuantizer]:
    """The quantizers of a prepared module's weights, by the names of their Parameters."""
    names = weight_names(type(prepared), prepared)
    return {name: getattr(prepared, f"{name}_quantizer") for name in names}


def matrices_of(prepared: Any) -> dict[str, Tensor]:
    """The 2-D views of a prepared module's weights, by the names of their Parameters."""
    kind = type(prepared)
    return {name: weight_of(kind, prepared, name).matrix for name in weight_names(kind, prepared)}


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


def output_of(
    module: Any, seen: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """What a prepared layer returns: its sums, normalised by the batch where it has a norm in training mode.

    Args:
        module: the layer.
        seen: its weight as its quantizer returns it, with a norm's factors.
        weight: without these and before the quantizer, in the same layout.
        compute: from a weight and a bias to the sums.
    """
    norm = norm_of(module)
    if norm is not None and norm.training:
        return normalised(module, seen, weight, compute)
    return compute(seen, seen_bias(module))


def weight_quantizer(weight: Tensor, scheme: Scheme, path: str) -> FakeQuantizer:
    """Of a weight's 2-D view. Round-to-nearest from the start: a weight needs no data to be calibrated.

    Raises:
        ValueError: the weight does not fit the scheme's blocks or is not finite.
    """
    return _fitted(weight, scheme.weights, f"{path}.weight")


def stack_quantizer(weight: Weight, scheme: Scheme, path: str) -> FakeQuantizer:
    """Of a stack of matrices; "per tensor" is per matrix, since an engine holds each as a tensor of its own.

    Args:
        weight: the stack.
        scheme: its numbers.
        path: the Parameter's name in the model, for messages.

    Raises:
        ValueError: see `weight_quantizer`.
    """
    spec = scheme.weights
    if spec.granularity.rows is None:
        spec = replace(spec, granularity=replace(spec.granularity, rows=weight.rows))
    return _fitted(weight.matrix, spec, path)


def _fitted(matrix: Tensor, spec: QuantSpec, path: str) -> FakeQuantizer:
    quantizer = FakeQuantizer(spec, rows=matrix.shape[0], columns=matrix.shape[1])
    quantizer.path = path
    quantizer.to(matrix.device)
    quantizer.fit(matrix.detach())
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
