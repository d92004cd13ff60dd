"""Is the program what was trained? Codes from the bytes, modules and outputs from torch.

in the bytes      every code, scale and zero point is the trained one
in the graph      exactly the modules of the plan hold codes, each is computed as its scheme says, and nothing
                  else in the file is stored in bytes
in the program    run node by node, as users run it: nothing fuses or folds it. Every quantized module, fed
                  what the program fed it, is within its bound (`parity.expected`)
end to end        the outputs differ by no more than rounding explains (`answers.py`)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from recoup.engines.pytorch import PytorchModel
from recoup.export.answers import answers
from recoup.export.parity import Array, Parity, ParityError, expected
from recoup.export.pytorch_modules import container_bits, container_zero, multiplies_integers
from recoup.export.tracing import positional
from recoup.export.trained import Layer, Stored, Trained, check_modules, check_stored, coded
from recoup.nn import Batch, CodedLinear
from recoup.numerics import QuantSpec

_BYTES = (torch.int8, torch.uint8)


@torch.no_grad()
def trained(model: nn.Module, folder: Path, example: Batch) -> Trained:
    """What folder/model.pt2 is compared with, from the converted model."""
    del folder
    modules, _ = coded(model)
    roundoff = max((_narrowing(module.weight.dtype) for module in modules.values()), default=0.0)
    return Trained.of(model, example, answers(model, example, weight_roundoff=roundoff))


def stored(folder: Path, layers: Mapping[str, Layer]) -> dict[str, Stored]:
    """Codes, scales and zero points of every quantized module, from the tensors in the file.

    Raises:
        ParityError: the file quantizes other modules, or what it has twice differs.
    """
    tensors = PytorchModel(folder).exported.state_dict
    found: dict[str, Stored] = {}
    for path, place in _where(tensors, layers).items():
        found[path] = _read(path, layers[path], tensors, place)
    return found


@torch.no_grad()
def compare(trained: Trained, folder: Path) -> Parity:
    """Compare folder/model.pt2 with what was trained.

    Raises:
        ParityError: one of the claims at the head of this file does not hold; names it.
    """
    codes, scales = check_stored(trained.modules, stored(folder, trained.layers))
    engine = PytorchModel(folder)
    _same_graph(engine, trained)
    outputs, worst = _compared(engine, trained)
    found = trained.answers.agree(outputs, "torch.export")
    return Parity(
        modules=len(trained.modules),
        codes=codes,
        scales=scales,
        worst_module=worst,
        end_to_end=found.drift,
        divergence=found.nats,
        same_word=found.same_word,
    )


def _where(tensors: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Of every module, the place whose tensors the file has.

    Raises:
        ParityError: it has others.
    """
    first = {place: path for path, layer in layers.items() for place in layer.places}
    found = {first.get(place, place): place for place in _quantized(tensors)}
    check_modules("the file quantizes", found, layers)
    return found


def _quantized(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The modules with codes, and where their tensors lie."""
    prefixes = [name.removesuffix("codes") for name in tensors if name.endswith(".codes")]
    return {prefix.removesuffix(".").removesuffix(".weight"): prefix for prefix in prefixes}


def _read(path: str, layer: Layer, tensors: Mapping[str, Tensor], place: str) -> Stored:
    spec, prefix = layer.scheme.weights, _quantized(tensors)[place]
    codes, scale = tensors[f"{prefix}codes"].numpy(), tensors[f"{prefix}scale"].numpy()
    if prefix.endswith(".weight."):
        codes = read_codes(spec, layer.shape, codes)
    found = {"codes": codes, "scale": scale.reshape(spec.granularity.scale_shape(*layer.shape))}
    if f"{prefix}zero_point" in tensors:
        found["zero_point"] = tensors[f"{prefix}zero_point"].numpy().astype(np.int32) - container_zero(spec)
    total = tensors.get(f"{prefix}total")
    if total is not None and not np.array_equal(total.numpy(), codes.sum(1, dtype=np.int64)):
        raise ParityError(f"{path}: the sums of codes read back from the file are not those of its codes")
    return found


def read_codes(spec: QuantSpec, shape: tuple[int, int], packed: Array) -> Array:
    """Codes (rows, columns) from packed rows, bit by bit.

    Raises:
        ParityError: the bytes are not those of such a matrix.
    """
    bits, (rows, columns) = container_bits(spec), shape
    if len(packed) != rows or packed.shape[1] * 8 // bits < columns:
        raise ParityError(f"{packed.shape} bytes hold no {rows} x {columns} codes of {bits} bits")
    stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(rows, packed.shape[1], 8 // bits, bits)
    fields = (stream.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(axis=3)
    in_order = fields.transpose(0, 2, 1).reshape(rows, -1)
    if in_order[:, columns:].any():
        raise ParityError("the bytes after the last code of a row are not zero")
    return in_order[:, :columns] - container_zero(spec)


def _same_graph(engine: PytorchModel, trained: Trained) -> None:
    """Every module is computed as its scheme says, and nothing else is quantized."""
    program, modules = engine.exported, _quantized(engine.exported.state_dict)
    for name, tensor in program.state_dict.items():
        if tensor.dtype in _BYTES and not any(name.startswith(prefix) for prefix in modules.values()):
            raise ParityError(f"{name}: is stored in bytes, and its module is not quantized")
    buffers = program.graph_signature.inputs_to_buffers
    users = {
        buffers[node.name]: [str(user.target) for user in node.users]
        for node in program.graph.nodes
        if node.name in buffers
    }
    called: dict[str, set[str]] = {path: set() for path in trained.modules}
    for place, prefix in modules.items():
        called[trained.places[place]].update(users.get(f"{prefix}codes", []))
    integers = 0
    for path, module in trained.modules.items():
        operators = called[path]
        in_integers = isinstance(module, CodedLinear) and multiplies_integers(
            module.scheme, module.in_features
        )
        if not operators or (operators == {"cond"}) != in_integers:
            raise ParityError(f"{path}: its codes are used by {sorted(operators) or 'nothing'}")
        integers += in_integers * sum(trained.places[call["module"]] == path for call in engine.calls)
    conditions = sum(str(node.target) == "cond" for node in program.graph.nodes)
    others = [node.name for node in program.graph.nodes if "aten._int_mm" in str(node.target)]
    if conditions != integers or len(others) != bool(integers):
        raise ParityError(f"{integers} calls multiply integers in the plan, and {conditions} in the program")


def _compared(engine: PytorchModel, trained: Trained) -> tuple[Any, float]:
    """The program's outputs, and the largest difference of a module's output as a share of its bound."""
    example, tapped = trained.example, _Tapped(engine.program, engine.calls)
    if isinstance(example, dict):
        given = engine.keywords((), example)
        result = tapped.run(*given.values(), enable_io_processing=False)
    else:
        result = tapped.run(*positional(example), enable_io_processing=False)
    worst = 0.0
    for index, call in enumerate(engine.calls):
        place = call["module"]
        y, bound = expected(trained.modules[trained.places[place]], tapped.inputs[index])
        excess = float(((tapped.outputs[index].double() - y).abs() / bound).max())
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
