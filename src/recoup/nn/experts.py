"""Layers of experts whose weights are stacks of matrices: those of transformers' mixture-of-experts models.

Since version 5 a layer of experts is one module with two 3-D Parameters, one matrix for each expert, and a
decorator, `use_experts_implementation`, says how they lie: with a gate or without, with biases, transposed.
It also takes the class' own forward away and computes from these attributes, and so does the twin: what each
expert does with its tokens is what two Linears of its own would do, `QuantLinear` for `QuantLinear`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer, LatticeState
from recoup.nn.fused import fused_matrices, fused_matrix, fuses, listened_to
from recoup.nn.twin import Inputs, Weight, adopt, input_quantizer, stack_quantizer
from recoup.schemes import Scheme

# What chooses experts, as models call it beside their `experts`.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

_MARKS = {
    "has_gate",
    "has_bias",
    "has_post_expert_norm",
    "is_transposed",
    "_is_expert_parallel",
    "num_experts",
}

Linear = Callable[[int, Tensor], Tensor]  # of an expert and its inputs


class Experts(nn.Module):
    """y_t = sum over the experts e of token t of p_te (D_e h + d_e), h = gate(U_e x_t + u_e).

    U is `gate_up_proj`, or `up_proj` where there is no gate, and D is `down_proj`. A norm of an expert's
    output is applied where the class has one. All attributes but `scheme` and `float_type` are the class's.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    scheme: Scheme
    float_type: type[nn.Module]

    def matrices(self, name: str) -> Tensor:
        """The rounded matrices of this name, (experts, out, in)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The equation, an expert at a time; those without tokens are not computed.

        Args:
            hidden_states: (tokens, features).
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k), p.
        """
        into, out_of = map(self.linear, _names(self))
        y = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            places, tokens = torch.where(top_k_index.T.eq(expert))
            of_expert = out_of(expert, self._apply_gate(into(expert, hidden_states[tokens])))
            if self.has_post_expert_norm:
                of_expert = self.post_expert_norm(of_expert)
            weighted = of_expert * top_k_weights[tokens, places, None]
            y.index_add_(0, tokens, weighted.to(y.dtype))
        return y

    def inner(self, expert: int, x: Tensor, matrix: Tensor) -> Tensor:
        """What an expert's rounded first matrix makes of its quantized inputs, for its second one."""
        y, bias = F.linear(x, matrix), f"{_names(self)[0]}_bias"
        return self._apply_gate(y + getattr(self, bias)[expert] if self.has_bias else y)

    def linear(self, name: str) -> Linear:
        """What the matrices of this name do with an expert's tokens."""
        matrices, quantizer = self.matrices(name).unbind(), getattr(self, f"{name}_input_quantizer")
        if not self.has_bias:
            return lambda expert, x: F.linear(quantizer(x), matrices[expert])
        bias: Tensor = getattr(self, f"{name}_bias")
        return lambda expert, x: F.linear(quantizer(x), matrices[expert]) + bias[expert]

    def _apply_gate(self, x: Tensor) -> Tensor:
        if not self.has_gate:
            return self.act_fn(x)
        # Each class has its own, or the decorator's: a function of the attributes, which are here.
        return cast(Any, self.float_type)._apply_gate(self, x)


class QuantExperts(Experts):
    """U, D, x and h on their lattices.

    The range of an input that is not dynamic is one for all experts, as engines have it. Switched off, this
    is the float module: computed as transformers does, by whichever implementation the config names.
    """

    inputs_are: ClassVar[Inputs] = "routed"

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter. See `QuantLinear.from_float`."""
        twin = adopt(cls, module, path)
        twin.scheme, twin.float_type = scheme, type(module)
        for name in cls.names(module):
            weight = cls.view(module, name)
            quantizer = stack_quantizer(weight, scheme, f"{path}.{name}")
            inputs = input_quantizer(weight.matrix.shape[1], scheme, f"{path}.{name}", weight.matrix.device)
            twin.add_module(f"{name}_quantizer", quantizer)
            twin.add_module(f"{name}_input_quantizer", inputs)
        return twin

    @staticmethod
    def names(module: Any) -> tuple[str, ...]:
        """Of the stack that makes h, and of the one that reads it."""
        return _names(module)

    @staticmethod
    def view(module: Any, name: str) -> Weight:
        """All experts' (out, in), one below the other."""
        stack: Tensor = getattr(module, name)
        if module.is_transposed:
            stack = stack.transpose(1, 2)
        return Weight(matrix=stack.flatten(0, 1), rows=stack.shape[1])

    @staticmethod
    def check(module: Any, scheme: Scheme, path: str) -> None:
        """Is this what the decorator says it is, and can experts have this scheme?

        Args:
            module: float, `is_experts`.
            scheme: its numbers.
            path: its name in the model.

        Raises:
            ValueError: it is not; or they cannot.
        """
        if module._is_expert_parallel:
            raise ValueError(
                f"{path}: its experts are spread over devices, and the twin computes all of them; load the "
                "model without expert parallelism"
            )
        found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
        if found != _declared(module) or any(0 in shape for shape in found.values()):
            raise ValueError(
                f"{path}: by its attributes a {type(module).__name__} has {_forms(module)}, none of them "
                f"empty, found {_written(found)}; keep it in float with {{match: {path}, scheme: none}}"
            )
        if scheme.integer_bias:
            raise ValueError(
                f"{path}: {scheme.name!r} has biases in steps of the products, and those of experts are "
                "floats; use w8a8-ort-static"
            )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The equation; see `Experts.forward`."""
        quantizers = [child for child in self.children() if isinstance(child, FakeQuantizer)]
        if any(quantizer.enabled or listened_to(quantizer) for quantizer in quantizers):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        return self.float_type.forward(self, hidden_states, top_k_index, top_k_weights)

    def linear(self, name: str) -> Linear:
        """What they do with an expert's tokens, as one function where that is the same; see `fused.py`."""
        stack = self.get_parameter(name)
        of_x, of_stack = getattr(self, f"{name}_input_quantizer"), getattr(self, f"{name}_quantizer")
        if not fuses(stack, of_x, of_stack):
            return super().linear(name)
        matrices = fused_matrices(stack, self.view(self, name).matrix, self.num_experts, of_stack)
        if not self.has_bias:
            return lambda expert, x: fused_matrix(x, matrices[expert], of_x, of_stack)
        biases = self.get_parameter(f"{name}_bias")
        return lambda expert, x: fused_matrix(x, matrices[expert], of_x, of_stack) + biases[expert]

    def matrix_of(self, name: str, expert: int) -> Tensor:
        """The matrix of this name of one expert, (out, in), as a view of its Parameter."""
        matrix = self.get_parameter(name)[expert]
        return matrix.T if self.is_transposed else matrix

    def matrices(self, name: str) -> Tensor:
        """The rounded matrices of this name, (experts, out, in)."""
        quantizer: FakeQuantizer = getattr(self, f"{name}_quantizer")
        return quantizer(self.view(self, name).matrix).unflatten(0, (self.num_experts, -1))


class ExpertsOfLinears(Experts):
    """The same of modules, one for each matrix that a checkpoint has, as gate and up apart.

    They belong to the model under the names of its checkpoint, and not to this.
    """

    def __init__(self, stacks: Any, linears: Mapping[str, Sequence[Sequence[nn.Module]]]) -> None:
        """Of a layer of experts, whose weights are left behind.

        Args:
            stacks: float, or converted; without biases.
            linears: by the name of a stack; of an expert, those whose outputs are joined.
        """
        nn.Module.__init__(self)
        vars(self).update({name: value for name, value in vars(stacks).items() if name not in vars(self)})
        self.float_type = getattr(stacks, "float_type", type(stacks))
        for name, child in stacks.named_children():
            if not isinstance(child, LatticeState):
                self.add_module(name, child)
        self.linears = linears

    def linear(self, name: str) -> Linear:
        """What the modules of this name do with an expert's tokens."""
        linears = self.linears[name]
        return lambda expert, x: torch.cat([linear(x) for linear in linears[expert]], dim=-1)


def is_experts(module: nn.Module) -> bool:
    """Is the forward of its type the one that transformers' `use_experts_implementation` puts in its place?

    And has it the attributes that the decorator sets? A subclass with a forward of its own is not: it may
    compute anything.
    """
    forward: Any = type(module).forward
    decorator = sys.modules.get("transformers.integrations.moe")
    return (
        decorator is not None
        and hasattr(forward, "__wrapped__")
        and getattr(forward, "__globals__", None) is vars(decorator)
        and _MARKS.issubset(vars(module))
    )


def routers(model: nn.Module) -> set[str]:
    """The modules that choose the experts of a token, by their names and the company that they keep."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, block in model.named_modules()
        for name, _ in block.named_children()
        if name in ROUTERS and hasattr(block, "experts")
    }


def _names(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _declared(module: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of its parameters by what the decorator says, for the sizes of its `down_proj`."""
    stack = getattr(module, "down_proj", None)
    if not isinstance(stack, Tensor) or stack.ndim != 3:
        return {}
    width, inner = stack.shape[:0:-1] if module.is_transposed else stack.shape[1:]
    sizes = {"experts": module.num_experts, "width": width, "inner": inner, "2 inner": 2 * inner}
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in _axes(module).items()}


def _axes(module: Any) -> dict[str, tuple[str, ...]]:
    up, down = _names(module)
    outer = "2 inner" if module.has_gate else "inner"
    axes: dict[str, tuple[str, ...]] = {up: (outer, "width"), down: ("width", "inner")}
    if module.is_transposed:
        axes = {name: named[::-1] for name, named in axes.items()}
    if module.has_bias:
        axes |= {f"{up}_bias": (outer,), f"{down}_bias": ("width",)}
    return {name: ("experts", *named) for name, named in axes.items()}


def _forms(module: Any) -> str:
    return ", ".join(f"{name} ({', '.join(axes)})" for name, axes in _axes(module).items())


def _written(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
