"""Is the file what was trained? Codes from the bytes, modules from the engine, outputs from end to end.

The bound of a module follows from its arithmetic, not from what was observed: see `_bound`.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup.engines.onnxruntime import OnnxModel
from recoup.export.onnx import FILE, MODULES
from recoup.export.onnx_nodes import container_bits
from recoup.export.parity import Parity, ParityError
from recoup.nn import Batch, CodedEmbedding, CodedLinear, FakeQuantizer, call, quantization_off

Array = np.ndarray[Any, np.dtype[Any]]
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    """Compare folder/model.onnx with the converted model it was written from.

    Every code, scale and zero point in the file equals the trained one; the file quantizes these modules
    and no others; every module, fed what the engine fed it, agrees within its bound; the outputs differ by
    no more than rounding errors explain.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    coded = {n: m for n, m in model.named_modules() if isinstance(m, (CodedLinear, CodedEmbedding))}
    file = onnx.load(folder / FILE)
    stored = read_codes(file)
    if set(stored) != set(coded):
        raise ParityError(
            f"the file quantizes other modules than the plan: {sorted(set(stored) ^ set(coded))}"
        )
    codes = scales = 0
    for path, module in coded.items():
        values, scale, zero_point = stored[path]
        weight = module.weight
        zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
        first = 0 if weight.spec.format.lo else 2 ** (container_bits(weight.spec.format.bits) - 1)
        _equal(path, "codes", values + first, weight.codes)
        _equal(path, "scale", scale, weight.scale)
        _equal(path, "zero point", np.broadcast_to(zero_point, scale.shape) + first, zero)
        codes, scales = codes + values.size, scales + scale.size

    mapped: dict[str, dict[str, str]] = json.loads(_metadata(file)[MODULES])
    engine = _OpenedFile(file, folder, mapped)
    results = engine.run(example)
    worst = 0.0
    for path, module in coded.items():
        x, y = results[mapped[path]["input"]], results[mapped[path]["output"]]
        expected, bound = _expected(module, x)
        excess = ((y.double() - expected).abs() / bound).max()
        if not excess <= 1:
            raise ParityError(
                f"{path}: onnxruntime's output is {float(excess):.3g} times its bound from the trained one"
            )
        worst = max(worst, float(excess))
    return Parity(
        modules=len(coded),
        codes=codes,
        scales=scales,
        worst_module=worst,
        end_to_end=_end_to_end(model, folder, example),
    )


def read_codes(file: onnx.ModelProto) -> dict[str, tuple[Array, Array, Array]]:
    """Codes, scales and zero points of every quantized module, unpacked from the file alone.

    Returns:
        By module: codes (rows, columns) as distances from the middle of their container, scales
        (rows, blocks), and zero points from the same middle, (rows, blocks) or a scalar.
    """
    initializers = {tensor.name: tensor for tensor in file.graph.initializer}
    modules: dict[str, tuple[Array, Array, Array]] = {}
    for node in file.graph.node:
        stored = next((name for name in node.input if name.endswith(".codes") and name in initializers), None)
        if stored is None:
            continue
        path = stored.removesuffix(".codes")
        arrays = {
            name: numpy_helper.to_array(initializers[f"{path}.{name}"])
            for name in ("codes", "scale", "zero_point")
            if f"{path}.{name}" in initializers
        }
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        modules[path] = _unpacked(node.op_type, attributes, **arrays)
    return modules


def _unpacked(
    op: str, attributes: Mapping[str, int], codes: Array, scale: Array, zero_point: Array | None = None
) -> tuple[Array, Array, Array]:
    if op in ("MatMulNBits", "GatherBlockQuantized"):
        bits = attributes["bits"]
        rows = codes.shape[0]
        scale = scale.reshape(rows, -1)
        middle = 2 ** (bits - 1)
        values = _bits(codes.reshape(rows, -1), bits) - middle
        if zero_point is None:
            return values, scale, np.array(0)
        return values, scale, _bits(zero_point.reshape(rows, -1), bits)[:, : scale.shape[1]] - middle
    middle = 128 if codes.dtype == np.uint8 else 0
    stored_zero = 0 if zero_point is None else int(zero_point)
    return (
        codes.reshape(codes.shape[-2:]).T.astype(np.int16) - middle,
        scale.reshape(-1, 1),
        np.array(stored_zero - middle),
    )


def _bits(rows: Array, bits: int) -> Array:
    """Bytes as bit streams, cut into little-endian fields."""
    stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return (stream.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(axis=2)


def _equal(path: str, what: str, found: Array, trained: Tensor) -> None:
    expected = trained.cpu().numpy()
    if found.shape != expected.shape or not np.array_equal(found, expected):
        where = (
            "its shape"
            if found.shape != expected.shape
            else tuple(map(int, np.argwhere(found != expected)[0]))
        )
        raise ParityError(
            f"{path}: the {what} read back from the file differ from the trained ones at {where}"
        )


def _expected(module: CodedLinear | CodedEmbedding, x: Tensor) -> tuple[Tensor, Tensor]:
    """A module's output in float64, and how far an engine with float32 arithmetic may be from it.

    With u = 2^-24, K products and one bias: a sum of K + 1 float32 terms in any order is off by at most
    (K + 1) u times the sum of magnitudes (Higham 2002, section 4.2); scaling adds a few more roundings. An
    input that lies within rounding error of a tie between two codes may go to either: one step of it.
    """
    weight = module.weight.decode().double()
    if isinstance(module, CodedEmbedding):
        y = torch.nn.functional.embedding(x, weight)
        return y, y.abs() * 2**-24 + _TINY
    seen, slack = module.input_quantizer(x).double(), _ties(module.input_quantizer, x).double()
    bias = torch.zeros(()) if module.bias is None else module.bias.double()
    magnitude = seen.abs() @ weight.abs().T + bias.abs()
    bound = (module.in_features + 8) * 2**-24 * magnitude + slack @ weight.abs().T
    return seen @ weight.T + bias, bound + _TINY


def _ties(quantizer: nn.Module, x: Tensor) -> Tensor:
    """By how much each quantized input may differ because its code is undecided in float32."""
    if not isinstance(quantizer, FakeQuantizer):
        return torch.zeros_like(x)
    view = x.reshape(-1, x.shape[-1])
    step = quantizer.qparams(view).step
    step = step.repeat_interleave(view.shape[0] // step.shape[0], 0).repeat_interleave(
        view.shape[1] // step.shape[1], 1
    )
    position = (view / step).abs()
    undecided = (position - position.floor() - 0.5).abs() <= 4 * 2**-24 * position.clamp(min=1)
    return (undecided * step.abs()).reshape(x.shape)


class _OpenedFile:
    """The file in a session that also returns the inputs and outputs of the quantized modules."""

    def __init__(self, file: onnx.ModelProto, folder: Path, modules: dict[str, dict[str, str]]) -> None:
        self.names = sorted({name for values in modules.values() for name in values.values()})
        opened = onnx.ModelProto()
        opened.CopyFrom(file)
        known = {value.name for value in (*opened.graph.input, *opened.graph.output)}
        inner = [name for name in self.names if name not in known]
        opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            onnx.save(
                opened,
                Path(temporary) / FILE,
                save_as_external_data=True,
                location="weights",
                size_threshold=1024,
            )
            self.model = OnnxModel(temporary)

    def run(self, example: Batch) -> dict[str, Tensor]:
        feeds = _feeds(example, self.model.inputs)
        inner = [name for name in self.names if name not in feeds]
        results = self.model.session.run(inner, feeds)
        return {
            n: torch.from_numpy(np.array(v)) for n, v in (*zip(inner, results, strict=True), *feeds.items())
        }


def _feeds(example: Batch, names: list[str]) -> dict[str, Array]:
    if isinstance(example, Mapping):
        return {name: example[name].cpu().numpy() for name in names}
    tensors: Sequence[Any] = [example] if isinstance(example, Tensor) else example
    return {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def _end_to_end(model: nn.Module, folder: Path, example: Batch) -> float:
    """How far the engine's outputs are from the trained model's.

    Two things make two correct engines differ. Rounding errors of sums: `_rounding_drift`. And, where
    inputs are quantized, a rounding error that flips a code: every later code of that token may then fall
    the other way, until the two runs are as far apart as if one of them rounded at random. That is at most
    what quantizing the inputs changes at all, so that is the allowance for it.
    """
    trained, engine = call(model, example), call(OnnxModel(folder), example)
    with quantization_off(model):
        flips = _relative_rms(trained, call(model, example))
    drift, allowed = _relative_rms(trained, engine), 3 * _rounding_drift(model, example) + flips
    if not drift <= allowed:
        raise ParityError(
            f"onnxruntime's outputs differ from the trained model's by {drift:.3g} (relative, RMS); rounding "
            f"explains {allowed:.3g}"
        )
    return drift


def _rounding_drift(model: nn.Module, example: Batch) -> float:
    """What the rounding errors of sums do to the outputs, without flipped codes.

    The model runs with float inputs, and once more with noise on the input of every quantized module, of
    the size of the rounding error of a sum of that length: 2^-24 sqrt(K) times the input's RMS (Higham
    2002, section 4.2).
    """
    noise = torch.Generator().manual_seed(0)

    def shaken(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        x = inputs[0]
        size = 2**-24 * x.shape[-1] ** 0.5 * x.square().mean().sqrt()
        return (x + size * torch.randn(x.shape, generator=noise), *inputs[1:])

    linears = [module for module in model.modules() if isinstance(module, CodedLinear)]
    handles = [module.register_forward_pre_hook(shaken) for module in linears]
    with quantization_off(model):
        try:
            shaken_outputs = call(model, example)
        finally:
            for handle in handles:
                handle.remove()
        return _relative_rms(call(model, example), shaken_outputs)


def _relative_rms(reference: Any, other: Any) -> float:
    pairs = list(zip(_tensors(reference), _tensors(other), strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (difference / max(sum(float(a.double().square().sum()) for a, _ in pairs), _TINY)) ** 0.5


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, Mapping) else output)


def _metadata(file: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in file.metadata_props}
