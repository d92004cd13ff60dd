"""onnxruntime: load a folder with model.onnx and run it, as users do, with the default session options."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OUTPUTS = "recoup.outputs"


class Outputs(dict[str, Tensor]):
    """Named outputs, also by attribute and by position, as transformers' models return them."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class OnnxModel(nn.Module):
    """A file in an onnxruntime session on the CPU. Call it with what the float model was called with.

    Args:
        path: model.onnx, or the folder around it.
        threads: of the session; onnxruntime's choice by default.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the extra is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("running an ONNX file needs onnxruntime: pip install 'recoup[onnx]'") from None
        file = Path(path) / "model.onnx" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; expected an exported ONNX model")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        names = [value.name for value in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.outputs: list[str] = json.loads(metadata[OUTPUTS]) if OUTPUTS in metadata else names

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | Outputs:
        """Run one batch.

        Raises:
            ValueError: an input is missing, or is none of the file's.
        """
        named = dict(zip(self.inputs, args, strict=False)) | {
            k: v for k, v in kwargs.items() if v is not None
        }
        if set(named) != set(self.inputs):
            raise ValueError(f"the file's inputs are {', '.join(self.inputs)}; given {', '.join(named)}")
        feeds = {
            name: np.ascontiguousarray(torch.as_tensor(value).cpu().numpy()) for name, value in named.items()
        }
        results = [torch.from_numpy(np.array(value)) for value in self.session.run(None, feeds)]
        if self.outputs == [""]:
            return results[0]
        return Outputs(zip(self.outputs, results, strict=True))
