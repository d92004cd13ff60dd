"""A file of ONNX's own operators, computed node by node as the standard defines them, and nothing fused.

That is what the file says; what an engine makes of its QuantizeLinear and DequantizeLinear is the engine's.
onnxruntime computes it, with its optimizations off, where it has a kernel for every operator and type on a
CPU. Where it has none, as for 4-bit floats and E8M0 scales, onnx.reference does: plain NumPy, and slow.
"""

import json
from importlib import import_module
from pathlib import Path

from torch import nn

from recoup.engines.onnx_file import check_onnx
from recoup.engines.onnxruntime import OUTPUTS, OnnxModel, model_file

NO_ENGINE = "onnx.reference (no CPU engine)"
UNMEASURED = (
    "no engine for such a file is installed on a CPU; measure it where it is served (TensorRT, OpenVINO)"
)


class StandardOnnx(OnnxModel):
    """A file, node by node. Call it with what the float model was called with.

    `engine` says who computes: "onnxruntime, nothing fused", or `NO_ENGINE`.

    Args:
        path: model.onnx, or the folder around it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or names data outside of its folder.
        ImportError: the extra is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        nn.Module.__init__(self)
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"running an ONNX file needs {error.name}: pip install 'recoup[onnx]'"
            ) from None
        errors = import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # has no types
        without_kernel: type[Exception] = errors.NotImplemented
        file = model_file(path)
        check_onnx(file)
        graph = onnx.load(file, load_external_data=False)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
            self.engine = "onnxruntime, nothing fused"
        except without_kernel:
            from onnx.reference import ReferenceEvaluator

            self.session = ReferenceEvaluator(onnx.load(file))
            self.engine = NO_ENGINE
        self.presents = {}  # such files are written for whole sequences
        stored = {tensor.name for tensor in graph.graph.initializer}
        self.inputs = [value.name for value in graph.graph.input if value.name not in stored]
        names = [value.name for value in graph.graph.output]
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        self.outputs = json.loads(metadata[OUTPUTS]) if OUTPUTS in metadata else names
