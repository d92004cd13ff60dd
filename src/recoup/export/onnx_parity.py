"""Is the file what was trained? Codes from the bytes, modules from the engine, outputs from end to end.

What is proven where:

    in the bytes             every code, scale and zero point is the trained one
    in the tapped session    the same file, which also returns the input and output of every quantized module:
                             each is within its bound, which follows from its arithmetic (`parity.expected`),
                             not from what was observed. A value that is returned cannot be fused away
    in the session of users  so what onnxruntime fuses only without taps is judged by the outputs alone, end
                             to end (see `parity.end_to_end`)
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
from recoup.export.onnx import AGAIN, FILE, MODULES
from recoup.export.onnx_nodes import container_bits
from recoup.export.parity import Parity, ParityError, end_to_end, equal, expected
from recoup.nn import Batch, call, is_coded

Array = np.ndarray[Any, np.dtype[Any]]


@torch.no_grad()
def verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    """Compare folder/model.onnx with the converted model it was written from.

    Every code, scale and zero point in the file equals the trained one; the file quantizes these modules
    and no others; every module, fed what the engine fed it, agrees within its bound; the outputs differ by
    no more than rounding errors explain.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    coded: dict[str, Any] = {name: module for name, module in model.named_modules() if is_coded(module)}
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
        equal(path, "codes", values + first, weight.codes)
        equal(path, "scale", scale, weight.scale)
        equal(path, "zero point", np.broadcast_to(zero_point, scale.shape) + first, zero)
        codes, scales = codes + values.size, scales + scale.size

    mapped: dict[str, dict[str, str]] = json.loads(_metadata(file)[MODULES])
    engine = _OpenedFile(file, folder, mapped)
    results = engine.run(example)
    worst = 0.0
    for called, values in mapped.items():
        path = called.partition(AGAIN)[0]
        x, y = results[values["input"]], results[values["output"]]
        trained, bound = expected(coded[path], x)
        excess = ((y.double() - trained).abs() / bound).max()
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
        end_to_end=end_to_end(model, call(OnnxModel(folder), example), example, engine="onnxruntime"),
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
    if op == "Cast":  # of a convolution: a row of codes for every output channel
        return codes.reshape(len(codes), -1), scale.reshape(-1, 1), np.array(0)
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


def _metadata(file: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in file.metadata_props}
