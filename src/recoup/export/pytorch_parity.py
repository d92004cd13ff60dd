"""Is the program what was trained? Codes from the bytes, modules and outputs from torch.

in the bytes      every code, scale and zero point is the trained one
in the graph      exactly the modules of the plan hold codes, each is computed as its scheme says, and nothing
                  else in the file is stored in bytes
in the program    run node by node, as users run it: nothing fuses or folds it. Every quantized module, fed
                  what the program fed it, is within its bound (`parity.expected`)
end to end        the outputs differ by no more than rounding explains (`parity.end_to_end`)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from recoup.engines.pytorch import PytorchModel
from recoup.export.parity import Array, Parity, ParityError, end_to_end, equal, expected
from recoup.export.pytorch_modules import container_bits, container_zero, multiplies_integers
from recoup.export.tracing import positional
from recoup.nn import Batch, CodedLinear, Codes, is_coded

_BYTES = (torch.int8, torch.uint8)


@torch.no_grad()
def verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    """Compare folder/model.pt2 with the converted model it was written from.

    Raises:
        ParityError: one of the claims at the head of this file does not hold; names it.
    """
    places: dict[str, Any] = {
        place: module for place, module in model.named_modules(remove_duplicate=False) if is_coded(module)
    }
    engine = PytorchModel(folder)
    tensors = engine.exported.state_dict
    modules = _quantized(tensors)
    found = {id(places[place]) for place in modules if place in places}
    if not set(modules) <= set(places) or found != {id(module) for module in places.values()}:
        raise ParityError(
            f"the file quantizes other modules than the plan: {sorted(set(modules) ^ set(places))}"
        )
    counted: dict[int, tuple[int, int]] = {}
    for place, prefix in modules.items():
        counted[id(places[place])] = _same_codes(place, places[place], tensors, prefix)
    _same_graph(engine, places, modules)
    outputs, worst = _compared(engine, places, example)
    roundoff = max((_narrowing(module.weight.dtype) for module in places.values()), default=0.0)
    return Parity(
        modules=len(counted),
        codes=sum(codes for codes, _ in counted.values()),
        scales=sum(scales for _, scales in counted.values()),
        worst_module=worst,
        end_to_end=end_to_end(model, outputs, example, engine="torch.export", weight_roundoff=roundoff),
    )


def _quantized(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The modules with codes, and where their tensors lie."""
    prefixes = [name.removesuffix("codes") for name in tensors if name.endswith(".codes")]
    return {prefix.removesuffix(".").removesuffix(".weight"): prefix for prefix in prefixes}


def _same_codes(place: str, module: Any, tensors: Mapping[str, Tensor], prefix: str) -> tuple[int, int]:
    weight: Codes = module.weight
    stored, scale = tensors[f"{prefix}codes"].numpy(), tensors[f"{prefix}scale"].numpy()
    packed = prefix.endswith(".weight.")
    values = read_codes(weight, stored) if packed else stored
    equal(place, "codes", values, weight.codes)
    equal(place, "scale", scale.reshape(tuple(weight.scale.shape)), weight.scale)
    if weight.zero_point is not None:
        zero_point = tensors[f"{prefix}zero_point"].numpy().astype(np.int32) - container_zero(weight.spec)
        equal(place, "zero point", zero_point, weight.zero_point)
    if f"{prefix}total" in tensors:
        total = tensors[f"{prefix}total"].numpy()
        equal(place, "sums of codes", total, weight.codes.long().sum(1).int())
    return values.size, scale.size


def read_codes(weight: Codes, packed: Array) -> Array:
    """Codes from packed rows, bit by bit."""
    bits, (rows, columns) = container_bits(weight.spec), weight.codes.shape
    stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(rows, packed.shape[1], 8 // bits, bits)
    fields = (stream.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(axis=3)
    in_order = fields.transpose(0, 2, 1).reshape(rows, -1)
    if in_order[:, columns:].any():
        raise ParityError("the bytes after the last code of a row are not zero")
    return in_order[:, :columns] - container_zero(weight.spec)


def _same_graph(engine: PytorchModel, places: Mapping[str, Any], modules: Mapping[str, str]) -> None:
    """Every module is computed as its scheme says, and nothing else is quantized."""
    program = engine.exported
    for name, tensor in program.state_dict.items():
        if tensor.dtype in _BYTES and not any(name.startswith(prefix) for prefix in modules.values()):
            raise ParityError(f"{name}: is stored in bytes, and its module is not quantized")
    buffers = program.graph_signature.inputs_to_buffers
    users = {
        buffers[node.name]: [str(user.target) for user in node.users]
        for node in program.graph.nodes
        if node.name in buffers
    }
    called: dict[int, set[str]] = {}
    for place, prefix in modules.items():
        called.setdefault(id(places[place]), set()).update(users.get(f"{prefix}codes", []))
    integers = 0
    for place, module in places.items():
        operators = called[id(module)]
        in_integers = isinstance(module, CodedLinear) and multiplies_integers(
            module.scheme, module.in_features
        )
        if not operators or (operators == {"cond"}) != in_integers:
            raise ParityError(f"{place}: its codes are used by {sorted(operators) or 'nothing'}")
        integers += in_integers * sum(call["module"] == place for call in engine.calls)
    conditions = sum(str(node.target) == "cond" for node in program.graph.nodes)
    others = [node.name for node in program.graph.nodes if "aten._int_mm" in str(node.target)]
    if conditions != integers or len(others) != bool(integers):
        raise ParityError(f"{integers} calls multiply integers in the plan, and {conditions} in the program")


def _compared(engine: PytorchModel, places: Mapping[str, Any], example: Batch) -> tuple[Any, float]:
    """The program's outputs, and the largest difference of a module's output as a share of its bound."""
    tapped = _Tapped(engine.program, engine.calls)
    if isinstance(example, dict):
        given = engine.keywords((), example)
        result = tapped.run(*given.values(), enable_io_processing=False)
    else:
        result = tapped.run(*positional(example), enable_io_processing=False)
    worst = 0.0
    for index, call in enumerate(engine.calls):
        place = call["module"]
        trained, bound = expected(places[place], tapped.inputs[index])
        excess = float(((tapped.outputs[index].double() - trained).abs() / bound).max())
        if not excess <= 1:
            raise ParityError(
                f"{place}: the program's output is {excess:.3g} times its bound from the trained one"
            )
        worst = max(worst, excess)
    values = dict(zip(engine.outputs, result, strict=True))
    return values[""] if engine.outputs == [""] else values, worst


class _Tapped(fx.Interpreter):
    """Runs a program node by node, and keeps what goes into quantized modules and what comes out."""

    def __init__(self, program: Any, calls: list[dict[str, Any]]) -> None:
        super().__init__(program)
        self.entries: dict[str, list[int]] = {}
        self.exits: dict[str, int] = {}
        for index, call in enumerate(calls):
            self.entries.setdefault(call["entry"], []).append(index)
            self.exits[call["output"]] = index
        self.calls = calls
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node; copies, because a model may change a tensor in place afterwards."""
        for index in self.entries.get(n.name, []):
            self.inputs[index] = self.env[n.all_input_nodes[self.calls[index]["place"]]].clone()
        result = super().run_node(n)
        if n.name in self.exits:
            self.outputs[self.exits[n.name]] = result.clone()
        return result


def _narrowing(dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
