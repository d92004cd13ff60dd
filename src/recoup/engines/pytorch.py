"""torch itself: load a folder with model.pt2 and run it on the CPU with the installed torch.

The same file runs without recoup: `torch.export.load("model.pt2").module()(**batch)`. What `PytorchModel`
adds is that it looks through the file first, because torch.export.load executes what a file tells it to.
"""

import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recoup.engines.outputs import Outputs
from recoup.engines.pytorch_archive import NOTES, check_archive
from recoup.nn import Batch

__all__ = ["FILE", "NOTES", "PytorchModel", "model_file", "peak_bytes", "size_bytes"]
FILE = "model.pt2"


class PytorchModel(nn.Module):
    """A program of torch.export. Call it with what the float model was called with.

    Args:
        path: model.pt2, or the folder around it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, was written by another torch that this one does not read, or holds
            something that a reader would execute.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        file = model_file(path)
        notes = check_archive(file)
        self.inputs: list[str] = notes["inputs"]
        self.outputs: list[str] = notes["outputs"]
        self.calls: list[dict[str, Any]] = notes["calls"]
        self.exported = _loaded(file)
        self.program = self.exported.module()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor | Outputs:
        """Run one batch.

        Raises:
            ValueError: an input is missing, or is none of the program's.
        """
        return self.named(self.program(*self.positional(args, kwargs), **self.keywords(args, kwargs)))

    def train(self, mode: bool = True) -> "PytorchModel":
        """A program is as it was traced, in eval mode, and refuses to be asked."""
        self.training = mode
        return self

    def named(self, result: Any) -> Tensor | Outputs:
        """What the program returned, as the model did."""
        return result if isinstance(result, Tensor) else Outputs(result)

    def positional(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call, as the program takes them by position."""
        if not self.inputs and kwargs:
            raise ValueError(f"the program takes its inputs by position; given {', '.join(kwargs)}")
        return () if self.inputs else args

    def keywords(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, as the program takes them by name.

        Raises:
            ValueError: an input is missing, or is none of the program's.
        """
        if not self.inputs:
            return {}
        named = dict(zip(self.inputs, args, strict=False)) | {
            k: v for k, v in kwargs.items() if v is not None
        }
        if set(named) != set(self.inputs) or len(args) > len(self.inputs):
            raise ValueError(f"the program's inputs are {', '.join(self.inputs)}; given {', '.join(named)}")
        return {name: named[name] for name in self.inputs}


def _loaded(file: Path) -> torch.export.ExportedProgram:
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs what it also raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about tensors that lie in the file
            return torch.export.load(file)
    except Exception as error:  # torch raises all kinds for a file that it cannot read
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file}: torch {torch.__version__} cannot read it ({reason}); export it again"
        ) from error
    finally:
        log.setLevel(level)


def peak_bytes(folder: Path, batch: Batch) -> int:
    """Peak resident memory of a fresh process that loads the file and runs the batch, torch itself included.

    Raises:
        RuntimeError: that process failed; with its last line.
    """
    check_archive(model_file(folder))
    named = dict(batch) if isinstance(batch, Mapping) else {}
    given = [] if named else [batch] if isinstance(batch, Tensor) else list(batch)
    tensors = {f"name.{name}": value for name, value in named.items()}
    tensors |= {f"place.{place}": value for place, value in enumerate(given)}
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, inputs)
        script = Path(__file__).with_name("pytorch_peak.py")
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(model_file(folder)), str(inputs)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"measuring the memory of {folder} failed: {done.stderr.strip().splitlines()[-1:]}"
        )
    return int(done.stdout)


def model_file(path: str | Path) -> Path:
    """The file itself: the path, or model.pt2 in the folder.

    Raises:
        FileNotFoundError: no such file.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a program of torch.export")
    return file


def size_bytes(folder: Path) -> int:
    """Bytes on disk of the model: graph and weights, without tokenizer and reports."""
    return model_file(folder).stat().st_size
