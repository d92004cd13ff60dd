"""The ways to write a quantized convolution for onnxruntime: what each costs, and what a session does to it.

    python benchmarks/onnx_convolutions.py --size 65

EfficientNet-Lite0 with its published weights, BatchNorm folded, calibrated on 64 images at w8a8-ort-static.
Every row holds the same codes, scales and biases, and differs in the nodes around them. "time" is over that
of the float file, medians of interleaved runs; "moved" is how far the outputs of a default session are from
those of one that fuses nothing (relative, RMS). Decision record 0010 quotes it.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, helper, numpy_helper
from safetensors.torch import load_file

import recoup
from recoup.tasks.assets import locate
from recoup.tasks.images import Preprocessing, read
from recoup.transforms import fuse

RUNS, IMAGES = 15, 64
sys.path.append(str(Path(__file__).parents[1] / "recipes"))


class Conv:
    """One convolution of the exported file, and the nodes and tensors that are written for it."""

    def __init__(self, file: onnx.ModelProto, node: NodeProto) -> None:
        self.node, self.path = node, node.input[2].removesuffix(".bias")
        stored = {tensor.name: tensor for tensor in file.graph.initializer}
        tensors = (stored[f"{self.path}.{name}"] for name in ("codes", "scale", "input_scale", "bias"))
        self.codes, scale, self.input_scale, self.bias = map(numpy_helper.to_array, tensors)
        self.scale = scale.ravel()
        quantizes = (n for n in file.graph.node if f"{self.path}.input_scale" in n.input)
        self.x = next(n.input[0] for n in quantizes if n.op_type == "QuantizeLinear")
        self.input_names = [f"{self.path}.input_scale", f"{self.path}.input_zero_point"]
        self.grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
        self.nodes: list[NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{self.path}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def tensor(self, name: str, array: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), f"{self.path}.{name}.form"))
        return self.tensors[-1].name

    def convolve(self, op: str, *inputs: str, output: str | None = None) -> str:
        attributes = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        return self(op, *inputs, output=output, **attributes)


def float_sums(c: Conv) -> None:
    """The form that `recoup.export` writes: its own nodes stay."""
    c.nodes.append(c.node)


def integers(c: Conv) -> None:
    codes = c("QuantizeLinear", c.x, *c.input_names)
    weight = c.tensor("codes", (c.codes.astype(np.int16) + 128).astype(np.uint8))
    zero = c.tensor("zero", np.uint8(128))
    total = c("Cast", c.convolve("ConvInteger", codes, weight, c.input_names[1], zero), to=FLOAT)
    scale = c.tensor("scale", (c.input_scale * c.scale).reshape(-1, 1, 1))
    c("Add", c("Mul", total, scale), c.tensor("bias", c.bias.reshape(-1, 1, 1)), output=c.node.output[0])


def integers_unless_grouped(c: Conv) -> None:
    (float_sums if c.grouped else integers)(c)


def recognized(weights: str) -> Callable[[Conv], None]:
    """Between QuantizeLinear and DequantizeLinear, which a session fuses to QLinearConv where it can."""

    def form(c: Conv) -> None:
        codes = c("QuantizeLinear", c.x, *c.input_names)
        x = c("DequantizeLinear", codes, *c.input_names)
        if weights == "float32":
            weight = c.tensor("weight", c.codes * c.scale.reshape(-1, 1, 1, 1))
        else:
            stored = c.codes if weights == "int8" else (c.codes.astype(np.int16) + 128).astype(np.uint8)
            zero = np.full(len(stored), 0 if weights == "int8" else 128, stored.dtype)
            parts = (c.tensor("codes", stored), c.tensor("scale", c.scale), c.tensor("zero", zero))
            weight = c("DequantizeLinear", *parts, axis=0)
        c.convolve("Conv", x, weight, f"{c.path}.bias", output=c.node.output[0])

    return form


FLOAT = onnx.TensorProto.FLOAT
FORMS: dict[str, Callable[[Conv], None]] = {
    "ConvInteger": integers,
    "ConvInteger, float sums where grouped": integers_unless_grouped,
    "DequantizeLinear, uint8 weights": recognized("uint8"),
    "DequantizeLinear, int8 weights": recognized("int8"),
    "DequantizeLinear, float weights": recognized("float32"),
    "float sums of codes": float_sums,
}


def written(file: onnx.ModelProto, form: Callable[[Conv], None]) -> bytes:
    """The file with its convolutions in this form."""
    file, nodes = copy.deepcopy(file), list[NodeProto]()
    for node in file.graph.node:
        if node.op_type != "Conv":
            nodes.append(node)
            continue
        conv = Conv(file, node)
        form(conv)
        nodes.extend(conv.nodes)
        file.graph.initializer.extend(conv.tensors)
    needed, kept = {value.name for value in file.graph.output}, list[NodeProto]()
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del file.graph.node[:]
    file.graph.node.extend(kept[::-1])
    tensors = [tensor for tensor in file.graph.initializer if tensor.name in needed]
    del file.graph.initializer[:]
    file.graph.initializer.extend(tensors)
    return file.SerializeToString()


def session(file: bytes, threads: int, *, fuses: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if not fuses:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def moved(file: bytes, images: np.ndarray, threads: int) -> float:
    feeds = {"pixel_values": images}
    found, plain = (session(file, threads, fuses=fuses).run(None, feeds)[0] for fuses in (True, False))
    return float(np.linalg.norm(found - plain) / np.linalg.norm(plain))


def times(files: dict[str, bytes], images: np.ndarray, threads: int) -> dict[str, float]:
    """Medians in seconds, interleaved."""
    sessions = {name: session(file, threads) for name, file in files.items()}
    found: dict[str, list[float]] = {name: [] for name in files}
    for run in range(RUNS + 1):
        for name, opened in sessions.items():
            start = time.perf_counter()
            opened.run(None, {"pixel_values": images})
            if run:  # the first allocates
                found[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def exported(size: int) -> tuple[dict[str, bytes], np.ndarray]:
    """The float file, the quantized one in every form, and images."""
    from efficientnet_fashion_mnist import MEAN, STD, WEIGHTS, EfficientNetLite0

    see = Preprocessing(size=(size, size), mean=(MEAN,), std=(STD,))
    images = see(read(locate("asset:fashion-mnist/test.parquet", Path()))[:IMAGES])
    model = EfficientNetLite0(1000)
    model.load_state_dict(load_file(locate(WEIGHTS, Path())))
    batch = {"pixel_values": images}
    fuse(model.eval(), batch)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        from recoup.export.onnx import write

        write(model, folder, batch)
        recoup.prepare(model, recoup.resolve(model, "w8a8-ort-static"))
        recoup.export(recoup.calibrate(model, [batch]), folder / "quantized", "onnx")
        plain, quantized = (onnx.load(place / "model.onnx") for place in (folder, folder / "quantized"))
    return {"float": plain.SerializeToString()} | {
        name: written(quantized, form) for name, form in FORMS.items()
    }, images.numpy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=65)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    files, images = exported(asked.size)
    columns = [times(files, images[:count], asked.threads) for count in (1, 8)]
    print(f"size {asked.size}, {asked.threads} threads, onnxruntime {onnxruntime.__version__}")
    print("| nodes | bytes | time, batch 1 | time, batch 8 | moved |\n|---|---|---|---|---|")
    for name, file in files.items():
        ratios = (f"{column[name] / column['float']:.2f}" for column in columns)
        print(f"| {name} | {len(file):,} | {' | '.join(ratios)} | {moved(file, images, asked.threads):.3f} |")


if __name__ == "__main__":
    main()
