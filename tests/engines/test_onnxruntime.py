"""onnxruntime: a file is called as the model was."""

import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recoup.engines.onnxruntime import OnnxModel, Outputs, model_file, peak_bytes, size_bytes

writer = importlib.import_module("recoup.export.onnx")


class Two(nn.Module):
    """Two inputs, two named outputs."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"total": x + y, "difference": x - y}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    writer.write(Two(), path, {"x": torch.zeros(2, 4), "y": torch.zeros(2, 4)})
    return path


def test_it_is_called_by_position_by_name_and_both(folder: Path) -> None:
    model, (x, y) = OnnxModel(folder, threads=1), torch.randn(2, 3, 4)
    assert model.inputs == ["x", "y"]
    for found in (model(x, y), model(y=y, x=x), model(x, y=y), model(x, y=y, labels=None)):
        assert torch.equal(found["total"], x + y)
        assert torch.equal(found["difference"], x - y)
    assert torch.equal(OnnxModel(folder / "model.onnx")(x.T.contiguous().T, y)["total"], x + y)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "one is missing": ((torch.zeros(2, 4),), {}),
    "one is None": ((), {"x": torch.zeros(2, 4), "y": None}),
    "one is unknown": ((), {"x": torch.zeros(2, 4), "y": torch.zeros(2, 4), "labels": torch.zeros(2)}),
    "too many": ((torch.zeros(2, 4),) * 3, {}),
}


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
def test_other_inputs_than_the_files_are_an_error(
    folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    model = OnnxModel(folder)
    with pytest.raises(ValueError, match="the file's inputs are x, y; given"):
        model(*args, **kwargs)
    with pytest.raises(ValueError, match="the file's inputs are x, y; given"):
        model.feeds(*args, **kwargs)


def test_outputs_by_name_attribute_and_position(folder: Path) -> None:
    found = OnnxModel(folder)(*torch.randn(2, 2, 4))
    assert isinstance(found, Outputs)
    assert list(found) == ["total", "difference"]
    assert found.total is found["total"] is found[0]
    assert found.difference is found[-1]
    assert found[:2] == (found.total, found.difference)
    with pytest.raises(AttributeError, match="no output 'logits'; there are total, difference"):
        _ = found.logits
    with pytest.raises(KeyError):
        found["logits"]
    with pytest.raises(IndexError):
        found[2]
    copied = pickle.loads(pickle.dumps(found))
    assert list(copied) == list(found)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "model.onnx", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"no such file; expected an exported ONNX model"):
            OnnxModel(path)
        with pytest.raises(FileNotFoundError):
            model_file(path)


def test_the_size_is_that_of_the_model_alone(folder: Path, tmp_path: Path) -> None:
    for name, data in {"model.onnx": b"12345", "model.onnx.data": b"678", "tokenizer.json": b"9"}.items():
        (tmp_path / name).write_bytes(data)
    assert size_bytes(tmp_path) == 8
    assert size_bytes(folder) == (folder / "model.onnx").stat().st_size


def test_peak_memory_is_that_of_a_fresh_process(folder: Path) -> None:
    batch = {"x": torch.zeros(2, 4), "y": torch.zeros(2, 4)}
    large = 2**20
    ours = np.ones(2**28, np.int8)  # what this process holds must not count
    small = peak_bytes(folder, batch)
    with_input = peak_bytes(folder, (torch.zeros(large, 4), torch.zeros(large, 4)))
    assert 2**20 < small < ours.nbytes
    # Two inputs and two outputs of 16 MiB are alive at once. What a process holds besides is pages.
    assert with_input - small > 3 * large * 16
    with pytest.raises(ValueError, match="the file's inputs are"):
        peak_bytes(folder, {"x": torch.zeros(2, 4)})


def test_a_process_that_fails_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxModel, "feeds", lambda *_, **__: {"x": np.zeros((2, 4), np.int8)})
    with pytest.raises(RuntimeError, match=r"measuring the memory of .* failed: .*Error"):
        peak_bytes(folder, {"x": torch.zeros(1)})
