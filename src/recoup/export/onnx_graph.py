"""Nodes under construction: what every lowering writes into."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

MICROSOFT = "com.microsoft"
Array = np.ndarray[Any, np.dtype[Any]]


class Graph:
    """Nodes and initializers under construction for one call of a module; `path` prefixes every name.

    Args:
        path: of the module.
        stored: what the file holds already, by name: a module that is called again has the same tensors.
        weight: of the module whose weight this one has; its own path where no other has it.
        tied: an embedding and a linear layer have this weight.
    """

    def __init__(self, path: str, stored: Mapping[str, ir.Value], weight: str, *, tied: bool) -> None:
        self.path, self.stored, self.tape = path, stored, Tape()
        self.owner, self.tied = weight, tied

    def __call__(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        return self.tape.op(op, inputs, attributes, domain=domain)

    def several(self, op: str, *inputs: ir.Value, outputs: int) -> tuple[ir.Value, ...]:
        """One node with several outputs."""
        return tuple(self.tape.op_multi_out(op, inputs, num_outputs=outputs))

    def initializer(self, name: str, array: Array) -> ir.Value:
        """A stored tensor, called `path.name` in the file."""
        return self._stored(f"{self.path}.{name}", array)

    def weight(self, name: str, array: Array) -> ir.Value:
        """A tensor of the weight: stored once for all modules that have it, under the first one's path."""
        return self._stored(f"{self.owner}.{name}", array)

    def _stored(self, name: str, array: Array) -> ir.Value:
        return (
            self.stored[name] if name in self.stored else self.tape.initializer(ir.tensor(array), name=name)
        )
