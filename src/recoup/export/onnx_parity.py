"""Is the file what was trained? Codes from the bytes, modules from the engine, outputs from end to end.

What is proven where:

    in the bytes             every code, scale and zero point is the trained one
    in the tapped session    the same file, which also returns the input and output of every quantized module:
                             each is within its bound, which follows from its arithmetic (`parity.expected`),
                             not from what was observed. A value that is returned cannot be fused away
    in the session of users  so what onnxruntime fuses only without taps is judged by the outputs alone, end
                             to end (see `answers.py`), and word after word (see `onnx_decoding.py`)
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from recoup.engines.onnxruntime import OnnxModel
from recoup.export import onnx_bytes, onnx_cache
from recoup.export.answers import answers
from recoup.export.onnx import ADDED, AGAIN, FILE, INPUT, LATTICE_OF, MODULES, RESULT, TIED
from recoup.export.onnx_decoding import generation
from recoup.export.onnx_layouts import container_bits
from recoup.export.onnx_report import in_float
from recoup.export.parity import Array, Parity, ParityError, added, equal, expected
from recoup.export.tracing import positional
from recoup.export.trained import Layer, Stored, Trained, check_modules, check_stored
from recoup.nn import OUTPUT, Batch, CodedConvTranspose, CodedModule, FakeQuantizer, call
from recoup.numerics import QuantSpec, dequantize


@torch.no_grad()
def trained(model: nn.Module, folder: Path, example: Batch) -> Trained:
    """What folder/model.onnx is compared with, from the converted model; also word after word."""
    spoken = generation(model, example) if onnx_cache.decodes(model, example) else None
    return replace(trained_whole(model, folder, example), generation=spoken)


@torch.no_grad()
def trained_whole(model: nn.Module, folder: Path, example: Batch) -> Trained:
    """The same of a file that is for whole sequences."""
    del folder
    example = onnx_cache.unpadded(model, example)
    return Trained.of(model, example, answers(model, example))


def stored(folder: Path, layers: Mapping[str, Layer]) -> dict[str, Stored]:
    """Codes, scales and zero points of every quantized module, from the bytes of the file.

    Raises:
        ParityError: the file quantizes other modules, or has zero points where the scheme has none.
    """
    file = onnx.load(folder / FILE)
    nodes = _modules(file)
    check_modules("the file quantizes", nodes, layers)
    tensors, packed = {tensor.name: tensor for tensor in file.graph.initializer}, read_codes(file)
    owners = _owners(file)
    return {
        path: _same_view(path, layer.scheme.weights, *packed[path]) | _bias_codes(path, tensors)
        if path in packed
        else _typed(owners.get(path, path), layer, tensors)
        for path, layer in layers.items()
    }


@torch.no_grad()
def compare(trained: Trained, folder: Path) -> Parity:
    """Compare folder/model.onnx with what was trained.

    Every code, scale and zero point in the file equals the trained one; the file quantizes these modules
    and no others; every module, fed what the engine fed it, agrees within its bound; the outputs, and where
    they are logits the words or classes, differ by no more than rounding errors explain.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    parity = compared(trained, folder, OnnxModel, "onnxruntime")
    return replace(parity, falls_back=in_float(onnx.load(folder / FILE, load_external_data=False)))


def compared(trained: Trained, folder: Path, load: Callable[[Path], OnnxModel], engine: str) -> Parity:
    """The proof, in whatever runs the file.

    Args:
        trained: what was.
        folder: with the file.
        load: folder -> the file in an engine.
        engine: its name, for messages.

    Raises:
        ParityError: see `compare`.
    """
    codes, scales = check_stored(trained.modules, stored(folder, trained.layers))
    shipped = load(folder)
    if trained.generation and not shipped.presents:
        raise ParityError(f"in {engine} the file does not decode, and what the trained model says is known")
    file = onnx.load(folder / FILE)
    mapped: dict[str, dict[str, str]] = json.loads(_metadata(file)[MODULES])
    outputs = {name: each for name, each in trained.lattices.items() if name.endswith(f".{OUTPUT}")}
    _same_outputs(file, mapped, trained.modules, outputs)
    results = _OpenedFile(file, folder, mapped, load).run(trained.example)
    worst = 0.0
    for called, values in mapped.items():
        path = called.partition(AGAIN)[0]
        y, expected_y, bound = _both(path, values, results, trained.modules, outputs)
        excess = ((y.double() - expected_y).abs() / bound).max()
        if not excess <= 1:
            raise ParityError(
                f"{path}: {engine}'s output is {float(excess):.3g} times its bound from the trained one"
            )
        worst = max(worst, float(excess))
    found = trained.answers.agree(call(shipped, trained.example), engine)
    spoken = trained.generation.agree(shipped) if trained.generation else (None, None)
    return Parity(
        modules=len(trained.modules),
        codes=codes,
        scales=scales,
        worst_module=worst,
        end_to_end=found.drift,
        divergence=found.nats,
        same_word=found.same_word,
        decoded=spoken[0],
        ties=spoken[1],
    )


def _same_outputs(
    file: onnx.ModelProto,
    mapped: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, CodedModule],
    trained: Mapping[str, FakeQuantizer],
) -> None:
    """The file quantizes the outputs of these modules and no others, with the trained scales.

    One that rounds again what is rounded has no scale there. That it changes nothing is seen in its output.

    Raises:
        ParityError: it does not; names the module.
    """
    found = {called.partition(AGAIN)[0] for called in mapped}
    check_modules("the file quantizes the outputs of", found - set(modules), trained)
    tensors = {tensor.name: tensor for tensor in file.graph.initializer}
    for path, quantizer in trained.items():
        name = f"{path.removesuffix(f'.{OUTPUT}')}.output_scale"
        if name not in tensors and mapped[path][INPUT] == mapped[path][RESULT]:
            continue
        if name not in tensors:
            raise ParityError(f"{path}: the file stores no scale of this output")
        scale = onnx_bytes.read_scales(tensors[name])
        equal(path, "scale", scale.reshape(1, 1), quantizer.stored_qparams.scale.detach())


def _both(
    path: str,
    values: Mapping[str, str],
    results: Mapping[str, Tensor],
    modules: Mapping[str, CodedModule],
    outputs: Mapping[str, FakeQuantizer],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the engine made of a module's input, what was trained, and how far they may be apart."""

    def lattice(end: str) -> FakeQuantizer | None:
        owner = values.get(f"{end}{LATTICE_OF}")
        if owner is None:
            return None
        found = outputs[owner] if owner in outputs else getattr(modules.get(owner), "input_quantizer", None)
        if not isinstance(found, FakeQuantizer):
            raise ParityError(f"{path}: the file has codes on the lattice of {owner}, and that has none")
        return found

    def value(end: str) -> Tensor:
        codes_of, found = lattice(end), results[values[end]]
        return found if codes_of is None else _decoded(found, codes_of)

    x, y, rounds = value(INPUT), value(RESULT), lattice(RESULT)
    if ADDED in values:
        expected_y, bound = added(x, value(ADDED))
        return y, *_rounded(expected_y, bound, outputs[path])
    if path in outputs:
        return y, *expected(outputs[path], x)
    module: Any = modules[path]
    found = expected(module, x)
    return y, *(found if rounds is None else _rounded(*found, rounds))


def _decoded(codes: Tensor, lattice: FakeQuantizer) -> Tensor:
    """What uint8 codes of an input stand for; signed ones lie around 128."""
    offset = 128 if lattice.spec.format.lo else 0
    view = codes.reshape(1, -1).to(torch.int16) - offset
    return dequantize(view, lattice.stored_qparams, lattice.spec).reshape(codes.shape)


def _rounded(trained: Tensor, bound: Tensor, lattice: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """The same of an output that the engine makes in codes, and that is decoded.

    A code is right if what it stands for is the nearest to something within the bound of the trained sum:
    half a step more. What lies outside of the lattice has the code at its end.
    """
    ends = _decoded(torch.tensor([0, 255], dtype=torch.uint8), lattice).double()
    return trained.clamp(*ends), bound + lattice.stored_qparams.step.double().flatten() / 2


def _modules(file: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The quantized modules of a file, each with the node that reads its codes; tied ones with the same."""
    stored = {tensor.name for tensor in file.graph.initializer if tensor.name.endswith(".codes")}
    readers = {
        name.removesuffix(".codes"): node
        for node in file.graph.node
        for name in node.input
        if name in stored and node.op_type != "Reshape"  # is no layout of its own
    }
    return readers | {path: readers[owner] for path, owner in _owners(file).items() if owner in readers}


def _owners(file: onnx.ModelProto) -> dict[str, str]:
    """Where the codes of a module lie that are stored for another one."""
    return json.loads(_metadata(file).get(TIED, "{}"))


def _is_typed(node: onnx.NodeProto) -> bool:
    """Reads codes in ONNX's own types, laid as they were trained; the other form has a third axis."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "DequantizeLinear" and axis < 2


def _same_view(
    path: str, spec: QuantSpec, values: Array, scale: Array, zero_point: Array
) -> dict[str, Array]:
    """Codes and zero points as they were trained, not as distances from the middle of their container.

    Raises:
        ParityError: the file has zero points, the scheme has none.
    """
    first = 0 if spec.format.lo else 2 ** (container_bits(spec.format.bits) - 1)
    zero = np.broadcast_to(zero_point, scale.shape) + first
    if spec.has_zero_point:
        return {"codes": values + first, "scale": scale, "zero_point": zero}
    if zero.any():
        raise ParityError(f"{path}: the zero point read back from the file is not 0, and the scheme has none")
    return {"codes": values + first, "scale": scale}


def _bias_codes(path: str, tensors: Mapping[str, onnx.TensorProto]) -> dict[str, Array]:
    """The bias, where the file has it in int32."""
    bias = tensors.get(f"{path}.bias")
    if bias is None or bias.data_type != onnx.TensorProto.INT32:
        return {}
    return {"bias_codes": numpy_helper.to_array(bias)}


def _typed(path: str, layer: Layer, tensors: Mapping[str, onnx.TensorProto]) -> Stored:
    """Of a weight in ONNX's own types; a transposed convolution's may lie (inputs, outputs, places)."""
    spec, stored = layer.scheme.weights, tensors[f"{path}.codes"]
    codes = onnx_bytes.read_codes(stored)
    if issubclass(layer.kind, CodedConvTranspose) and len(stored.dims) > 2:
        codes = codes.reshape(tuple(stored.dims)).swapaxes(0, 1).reshape(stored.dims[1], -1)
    shape = spec.granularity.scale_shape(*codes.shape)
    found = {"codes": codes, "scale": onnx_bytes.read_scales(tensors[f"{path}.scale"]).reshape(shape)}
    if f"{path}.zero_point" in tensors:
        zero_point = onnx_bytes.read_codes(tensors[f"{path}.zero_point"]).reshape(shape)
        if spec.has_zero_point or zero_point.any():
            found["zero_point"] = zero_point
    if f"{path}.global_scale" in tensors:
        found["global_scale"] = onnx_bytes.read_scales(tensors[f"{path}.global_scale"])
    return found


def read_codes(file: onnx.ModelProto) -> dict[str, tuple[Array, Array, Array]]:
    """Codes, scales and zero points of every module in a layout of onnxruntime, unpacked from the file alone.

    Returns:
        By module: codes (rows, columns) as distances from the middle of their container, scales
        (rows, blocks), and zero points from the same middle, (rows, blocks) or a scalar.
    """
    initializers = {tensor.name: tensor for tensor in file.graph.initializer}
    modules: dict[str, tuple[Array, Array, Array]] = {}
    owners = _owners(file)
    for path, node in _modules(file).items():
        if _is_typed(node):
            continue
        owner = owners.get(path, path)
        arrays = {
            name: numpy_helper.to_array(initializers[f"{owner}.{name}"])
            for name in ("codes", "scale", "zero_point")
            if f"{owner}.{name}" in initializers
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
    if op in ("Cast", "QLinearConv"):  # of a convolution: a row of codes for every output channel
        zeros = np.array(0) if zero_point is None else zero_point.reshape(-1, 1)
        return codes.reshape(len(codes), -1), scale.reshape(-1, 1), zeros
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
        ends = (INPUT, ADDED, RESULT)
        self.names = sorted({values[end] for values in modules.values() for end in ends if end in values})
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
        given = example if isinstance(example, Mapping) else {}
        feeds = self.model.feeds(*([] if given else positional(example)), **given)
        inner = [name for name in self.names if name not in feeds]
        results = self.model.session.run(inner, feeds)
        return {
            n: torch.from_numpy(np.array(v)) for n, v in (*zip(inner, results, strict=True), *feeds.items())
        }


def _metadata(file: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in file.metadata_props}
