"""onnxruntime: load a folder with model.onnx and run it, as users do, with the default session options."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines.onnx_file import check_onnx
from recoup.engines.onnxruntime_decoding import Decoder, empty_pasts, presents_of, whole
from recoup.engines.outputs import Outputs
from recoup.nn import Batch

OUTPUTS = "recoup.outputs"
Array = np.ndarray[Any, np.dtype[Any]]


class OnnxModel(nn.Module):
    """A file in an onnxruntime session on the CPU. Call it with what the float model was called with.

    A file that decodes is then given an empty past, and answers without its presents. `presents` names those
    by the input that each becomes in the next step; it is empty for any other file.

    Args:
        path: model.onnx, or the folder around it.
        threads: of the session; onnxruntime's choice by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, names data outside of its folder, or is none that onnxruntime loads.
        ImportError: the extra is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("running an ONNX file needs onnxruntime: pip install 'recoup[onnx]'") from None
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        file = model_file(path)
        check_onnx(file)
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            self.inputs = [value.name for value in self.session.get_inputs()]
            self.presents = presents_of(self.session)
            names = [value.name for value in self.session.get_outputs()]
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.outputs: list[str] = json.loads(metadata[OUTPUTS]) if OUTPUTS in metadata else names
        except Exception as error:  # onnxruntime's own are of many types, with no common one but this
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{file}: onnxruntime cannot load it ({reason}); export it again") from error

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | Outputs:
        """Run one batch.

        Raises:
            ValueError: an input is missing, or is none of the file's.
        """
        feeds = self.feeds(*args, **kwargs)
        names = [name for name in self.outputs if name not in self.presents.values()]
        asked = names if self.presents else None  # by its own names, which others than decoders may not have
        results = [torch.from_numpy(np.array(value)) for value in self.session.run(asked, feeds)]
        if self.outputs == [""]:
            return results[0]
        return Outputs(zip(names, results, strict=True))

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int
    ) -> Tensor:
        """The most likely words, one after the other; none ends a sequence early.

        Args:
            input_ids: the prompts (samples, tokens); shorter ones are padded on the left.
            attention_mask: 0 where they are; all ones by default.
            max_new_tokens: of every sample.

        Returns:
            The new tokens (samples, max_new_tokens).

        Raises:
            ValueError: the file does not decode.
        """
        decoder, tokens = self.decoder(), list[Tensor]()
        read, mask = input_ids, attention_mask
        for _ in range(max_new_tokens):
            tokens.append(decoder.read(read, mask).argmax(dim=-1))
            read, mask = tokens[-1][:, None], None
        return torch.stack(tokens, dim=1)

    def decoder(self) -> Decoder:
        """A batch of sequences that nothing is read of yet.

        Raises:
            ValueError: the file does not decode.
        """
        if not self.presents:
            raise ValueError(
                "the file has no past_key_values, so it does not decode; export a transformers model whose "
                "generation_config.use_cache is not False, to the target onnx"
            )
        return Decoder(self.session, self.presents)

    def feeds(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """The arguments of a call as the session takes them.

        Raises:
            ValueError: an input is missing, or is none of the file's.
        """
        named = dict(zip(self.inputs, args, strict=False)) | {
            k: v for k, v in kwargs.items() if v is not None
        }
        if self.presents and "input_ids" in named:
            assumed = whole(named["input_ids"]) | empty_pasts(self.session, len(named["input_ids"]))
            named = {name: assumed[name] for name in self.inputs if name in assumed} | named
        if set(named) != set(self.inputs) or len(args) > len(self.inputs):
            raise ValueError(f"the file's inputs are {', '.join(self.inputs)}; given {', '.join(named)}")
        return {
            name: np.ascontiguousarray(torch.as_tensor(value).cpu().numpy()) for name, value in named.items()
        }


def peak_bytes(folder: Path, batch: Batch) -> int:
    """Peak resident memory of a fresh process that loads the file and runs the batch.

    Raises:
        RuntimeError: that process failed; with its last line.
    """
    model = OnnxModel(folder)
    feeds = model.feeds(**batch) if isinstance(batch, Mapping) else model.feeds(*_positional(batch))
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs.npz"
        np.savez(inputs, **cast(Any, feeds))
        script = Path(__file__).with_name("onnxruntime_peak.py")
        done = subprocess.run(
            # -P: beside the script lies a module that is called onnxruntime, too
            [sys.executable, "-P", str(script), str(model_file(folder)), str(inputs)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"measuring the memory of {folder} failed: {done.stderr.strip().splitlines()[-1:]}"
        )
    return int(done.stdout)


def model_file(path: str | Path) -> Path:
    """The file itself: the path, or model.onnx in the folder.

    Raises:
        FileNotFoundError: no such file.
    """
    file = Path(path) / "model.onnx" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected an exported ONNX model")
    return file


def size_bytes(folder: Path) -> int:
    """Bytes on disk of the model: graph and weights, without tokenizer and reports."""
    file = model_file(folder)
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def _positional(batch: Batch) -> tuple[Any, ...]:
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)
