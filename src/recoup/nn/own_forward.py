"""Modules with a forward of their own that multiplies by a Parameter: the twin runs it, the weight rounded.

Subclasses of torch's layers pad, transpose or standardize before they compute, and models have layers whose
weights are stacks of matrices. Whatever such a forward does, it reads its weight as an attribute, and finds
the rounded one there. What meets the weight inside is not seen from outside, so inputs stay in float.
"""

from collections.abc import Mapping
from inspect import getattr_static
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.twin import Inputs, Weight, adopt, stack_quantizer
from recoup.schemes import Scheme

# How weights lie, by the name of a class, for its subclasses too. An axis is of outputs (o), of inputs that
# one output sums over (i), or of a stack of matrices (s).
LAYOUTS: dict[str, dict[str, str]] = {
    "torch.nn.modules.linear.Linear": {"weight": "oi"},
    "torch.nn.modules.conv.Conv1d": {"weight": "oii"},
    "torch.nn.modules.conv.Conv2d": {"weight": "oiii"},
    "torch.nn.modules.conv.Conv3d": {"weight": "oiiii"},
    "torch.nn.modules.rnn.GRUCell": {"weight_ih": "oi", "weight_hh": "oi"},
    "torch.nn.modules.rnn.LSTMCell": {"weight_ih": "oi", "weight_hh": "oi"},
    "transformers.models.csm.modeling_csm.CsmCodebooksHead": {"weight": "sio"},
    "transformers.models.funnel.modeling_funnel.FunnelRelMultiheadAttention": {"r_kernel": "ioo"},
    "transformers.models.ibert.quant_modules.QuantLinear": {"weight": "oi"},
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": {"weight": "soi"},
    "transformers.models.moshi.modeling_moshi.MoshiFlexibleLinear": {"weight": "soi"},
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru": {
        "input_gate_weight": "sio", "recurrent_gate_weight": "sio",
    },
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": {
        "q": "ioo", "k": "ioo", "v": "ioo", "r": "ioo", "o": "oii",
    },
}  # fmt: skip


class OwnForward(nn.Module):
    """What the float module computes, with other weights than it holds."""

    float_type: type[nn.Module]
    layout: dict[str, str]
    shapes: dict[str, torch.Size]

    def rounded(self, name: str) -> Tensor:
        """The 2-D view of the weight of this name, on its lattice."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float module's own, in whose place a module of its type runs, with all that this one holds."""
        running = self.float_type.__new__(self.float_type)
        held, weights = self._parameters, self.layout.items()
        seen = {name: _laid(self.rounded(name), self.shapes[name], axes) for name, axes in weights}
        vars(running).update(vars(self), _parameters={**held, **seen})
        try:
            return self.float_type.forward(running, *args, **kwargs)
        finally:
            vars(self).update(vars(running), _parameters=held)

    def __getattr__(self, name: str) -> Any:
        """Methods and properties of the float module's type, too, which modules around it may ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr_static(vars(self).get("float_type"), name, None)
            if not hasattr(found, "__get__"):
                raise
            return found.__get__(self)


class QuantOwnForward(OwnForward):
    """The float module's forward with Q(W)."""

    inputs_are: ClassVar[Inputs] = "unseen"
    scheme: Scheme

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter. See `QuantLinear.from_float`."""
        twin = adopt(cls, module, path)
        twin.scheme, twin.float_type, twin.layout = scheme, type(module), dict(layout_of(module))
        twin.shapes = {name: getattr(module, name).shape for name in twin.layout}
        for name in twin.layout:
            quantizer = stack_quantizer(cls.view(module, name), scheme, f"{path}.{name}")
            twin.add_module(f"{name}_quantizer", quantizer)
        return twin

    @staticmethod
    def names(module: nn.Module) -> tuple[str, ...]:
        """Those of the layout."""
        return tuple(layout_of(module))

    @staticmethod
    def view(module: nn.Module, name: str) -> Weight:
        """(outputs, inputs) of every matrix, one below the other."""
        weight, axes = getattr(module, name), layout_of(module)[name]
        stack, outputs, inputs = (
            prod(size for size, of in zip(weight.shape, axes, strict=True) if of == kind) for kind in "soi"
        )
        return Weight(matrix=weight.permute(_order(axes)).reshape(stack * outputs, inputs), rows=outputs)

    @staticmethod
    def check(module: nn.Module, scheme: Scheme, path: str) -> None:
        """Can it have this scheme?

        Raises:
            ValueError: the scheme quantizes inputs.
        """
        if scheme.inputs is not None:
            raise ValueError(
                f"{path}: {scheme.name!r} quantizes inputs, and what meets the weight inside of a "
                f"{type(module).__name__} is not known; use w8a16 or w4a16, or keep it in float"
            )

    def rounded(self, name: str) -> Tensor:
        """The 2-D view of the weight of this name, on its lattice."""
        quantizer: FakeQuantizer = getattr(self, f"{name}_quantizer")
        return quantizer(self.view(self, name).matrix)


def layout_of(module: nn.Module) -> Mapping[str, str]:
    """How the weights of a module lie, float or prepared; of none where nothing is known of its type."""
    if isinstance(module, OwnForward):
        return module.layout
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return next((LAYOUTS[name] for name in names if name in LAYOUTS), _layout_of_experts(module))


def _layout_of_experts(module: nn.Module) -> Mapping[str, str]:
    """Stacks of matrices by their customary names, which the class's forward reads; shapes say how they lie.

    Every expert has a product with `gate_up_proj`, twice as many outputs as `down_proj` has inputs, and as
    many inputs as that has outputs.
    """
    found = dict(module.named_parameters(recurse=False))
    up, down = found.get("gate_up_proj"), found.get("down_proj")
    code: Any = getattr(type(module).forward, "__code__", None)
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or code is None:
        return {}
    for axes in ("soi", "sio"):
        (outer, width), (outputs, inner) = ([s.shape[axes.index(a)] for a in "oi"] for s in (up, down))
        if (outer, width) == (2 * inner, outputs) and {"gate_up_proj", "down_proj"} <= {*code.co_names}:
            return dict.fromkeys(("gate_up_proj", "down_proj"), axes)
    return {}


def _order(axes: str) -> list[int]:
    """The axes of the stack first, then those of outputs, then those of inputs."""
    return sorted(range(len(axes)), key=lambda axis: "soi".index(axes[axis]))


def _laid(matrix: Tensor, shape: torch.Size, axes: str) -> Tensor:
    """A 2-D view in the shape of its Parameter again."""
    order = _order(axes)
    return matrix.reshape([shape[axis] for axis in order]).permute(sorted(order, key=order.__getitem__))
