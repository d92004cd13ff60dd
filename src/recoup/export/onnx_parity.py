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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup.engines.onnxruntime import OnnxModel
from recoup.export import onnx_bytes
from recoup.export.onnx import AGAIN, FILE, MODULES
from recoup.export.onnx_nodes import container_bits
from recoup.export.onnx_report import in_float
from recoup.export.parity import Parity, ParityError, divergence, end_to_end, equal, expected
from recoup.nn import OUTPUT, Batch, Codes, FakeQuantizer, call, is_coded, output_quantizers

Array = np.ndarray[Any, np.dtype[Any]]


@torch.no_grad()
def verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    """Compare folder/model.onnx with the converted model it was written from.

    Every code, scale and zero point in the file equals the trained one; the file quantizes these modules
    and no others; every module, fed what the engine fed it, agrees within its bound; the outputs, and where
    they are logits the words or classes, differ by no more than rounding errors explain.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    parity = compared(model, folder, example, OnnxModel, "onnxruntime")
    return replace(parity, falls_back=in_float(onnx.load(folder / FILE, load_external_data=False)))


def compared(
    model: nn.Module, folder: Path, example: Batch, load: Callable[[Path], OnnxModel], engine: str
) -> Parity:
    """The proof, in whatever runs the file.

    Args:
        model: converted.
        folder: with the file.
        example: the batch to compare with.
        load: folder -> the file in an engine.
        engine: its name, for messages.

    Raises:
        ParityError: see `verify`.
    """
    coded: dict[str, Any] = {name: module for name, module in model.named_modules() if is_coded(module)}
    file = onnx.load(folder / FILE)
    stored, packed = _modules(file), read_codes(file)
    if set(stored) != set(coded):
        raise ParityError(
            f"the file quantizes other modules than the plan: {sorted(set(stored) ^ set(coded))}"
        )
    counts = [
        _same_codes(path, module.weight, *packed[path])
        if path in packed
        else _same_typed_codes(path, module.weight, file)
        for path, module in coded.items()
    ]
    mapped: dict[str, dict[str, str]] = json.loads(_metadata(file)[MODULES])
    outputs_of = {f"{path}.{OUTPUT}": quantizer for path, quantizer in output_quantizers(model).items()}
    _same_outputs(file, {called.partition(AGAIN)[0] for called in mapped} - set(coded), outputs_of)
    results = _OpenedFile(file, folder, mapped, load).run(example)
    worst = 0.0
    for called, values in mapped.items():
        path = called.partition(AGAIN)[0]
        x, y = results[values["input"]], results[values["output"]]
        trained, bound = expected(outputs_of.get(path) or coded[path], x)
        excess = ((y.double() - trained).abs() / bound).max()
        if not excess <= 1:
            raise ParityError(
                f"{path}: {engine}'s output is {float(excess):.3g} times its bound from the trained one"
            )
        worst = max(worst, float(excess))
    outputs = call(load(folder), example)
    nats, same = None, None
    if isinstance(outputs, Mapping) and "logits" in outputs:
        nats, same = divergence(_Logits(model), outputs["logits"], example, engine=engine)
    return Parity(
        modules=len(coded),
        codes=sum(codes for codes, _ in counts),
        scales=sum(scales for _, scales in counts),
        worst_module=worst,
        end_to_end=end_to_end(model, outputs, example, engine=engine),
        divergence=nats,
        same_word=same,
    )


def _same_outputs(file: onnx.ModelProto, found: set[str], trained: Mapping[str, FakeQuantizer]) -> None:
    """The file quantizes the outputs of these modules and no others, with the trained scales.

    Raises:
        ParityError: it does not; names the module.
    """
    if found != set(trained):
        raise ParityError(f"the file quantizes other outputs than the plan: {sorted(found ^ set(trained))}")
    tensors = {tensor.name: tensor for tensor in file.graph.initializer}
    for path, quantizer in trained.items():
        scale = onnx_bytes.read_scales(tensors[f"{path.removesuffix(f'.{OUTPUT}')}.output_scale"])
        equal(path, "scale", scale.reshape(1, 1), quantizer.stored_qparams.scale.detach())


class _Logits(nn.Module):
    """A model whose outputs are its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs)["logits"]


def _modules(file: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The quantized modules of a file, each with the node that reads its codes."""
    stored = {tensor.name for tensor in file.graph.initializer if tensor.name.endswith(".codes")}
    return {
        name.removesuffix(".codes"): node for node in file.graph.node for name in node.input if name in stored
    }


def _is_typed(node: onnx.NodeProto) -> bool:
    """Reads codes in ONNX's own types, laid as they were trained; the other form has a third axis."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "DequantizeLinear" and axis < 2


def _same_codes(path: str, weight: Codes, values: Array, scale: Array, zero_point: Array) -> tuple[int, int]:
    """How many codes and scales were compared.

    Raises:
        ParityError: one differs.
    """
    zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    first = 0 if weight.spec.format.lo else 2 ** (container_bits(weight.spec.format.bits) - 1)
    equal(path, "codes", values + first, weight.codes)
    equal(path, "scale", scale, weight.scale)
    equal(path, "zero point", np.broadcast_to(zero_point, scale.shape) + first, zero)
    return values.size, scale.size


def _same_typed_codes(path: str, weight: Codes, file: onnx.ModelProto) -> tuple[int, int]:
    """Of a weight in ONNX's own types, whose DequantizeLinear reads it as it was trained."""
    tensors = {tensor.name: tensor for tensor in file.graph.initializer}
    codes, scale = (
        onnx_bytes.read_codes(tensors[f"{path}.codes"]),
        onnx_bytes.read_scales(tensors[f"{path}.scale"]),
    )
    equal(path, "codes", codes, weight.codes)
    equal(path, "scale", scale.reshape(weight.scale.shape), weight.scale)
    if weight.zero_point is not None:
        zero_point = onnx_bytes.read_codes(tensors[f"{path}.zero_point"])
        equal(path, "zero point", zero_point.reshape(weight.scale.shape), weight.zero_point)
    if weight.global_scale is not None:
        equal(
            path, "global scale", onnx_bytes.read_scales(tensors[f"{path}.global_scale"]), weight.global_scale
        )
    return codes.size, scale.size


def read_codes(file: onnx.ModelProto) -> dict[str, tuple[Array, Array, Array]]:
    """Codes, scales and zero points of every module in a layout of onnxruntime, unpacked from the file alone.

    Returns:
        By module: codes (rows, columns) as distances from the middle of their container, scales
        (rows, blocks), and zero points from the same middle, (rows, blocks) or a scalar.
    """
    initializers = {tensor.name: tensor for tensor in file.graph.initializer}
    modules: dict[str, tuple[Array, Array, Array]] = {}
    for path, node in _modules(file).items():
        if _is_typed(node):
            continue
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

    def __init__(
        self,
        file: onnx.ModelProto,
        folder: Path,
        modules: dict[str, dict[str, str]],
        load: Callable[[Path], OnnxModel],
    ) -> None:
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
            self.model = load(Path(temporary))

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
