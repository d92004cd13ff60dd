"""A disk that fills in the middle: one error that names the folder, and nothing is left, for every target.

The disk is a limit on the size of a file, which the system keeps for whoever writes, native code included.
"""

import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recoup import export, ptq
from recoup.export import TARGETS
from tests.export import gguf_models, llamas


def linear() -> nn.Module:
    return ptq(nn.Sequential(nn.Linear(64, 64)).eval(), "w8a8", [torch.randn(4, 64)])


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "onnx": (linear, "model.onnx"),
    "onnx-qdq": (linear, "model.onnx"),
    "pytorch": (linear, "model.pt2"),
    "gguf": (lambda: gguf_models.quantized("q8_0", gguf_models.small("qwen2")), "model.gguf"),
    "compressed-tensors": (lambda: llamas.quantized("w4a16"), "model.safetensors"),
}


@contextmanager
def files_of_at_most(size: int) -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore:the artefact has no tokenizer")
@pytest.mark.parametrize("target", MODELS)
def test_a_full_disk_leaves_nothing(target: str, tmp_path: Path) -> None:
    make, name = MODELS[target]
    model = make()
    example: Any = None if MODELS[target][0] is linear else gguf_models.batch()
    if target == "compressed-tensors":
        example = llamas.batch()
    whole, place = tmp_path / "whole", tmp_path / "out"
    export(model, whole, target, example=example)
    size = (whole / name).stat().st_size
    for room in (0, 100, size // 2, size - 1):
        with (
            files_of_at_most(room),
            pytest.raises(
                OSError, match=r"out: cannot be written \([^\n]*\); nothing of it is left: make room"
            ),
        ):
            export(model, place, target, example=example)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with files_of_at_most(2 * size + 2**20):
        export(model, place, target, example=example)
    assert (place / name).read_bytes()


def test_every_target_is_among_them() -> None:
    assert set(MODELS) == set(TARGETS)
