"""EfficientNet-Lite0 on Fashion-MNIST for qat_quality.py.

The float model is that of `recipes/efficientnet_fashion_mnist.py`, which fine-tunes it once, for all tools.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import qat_quality_language_model
import torch
import torch.nn.functional as F
from qat_quality_encoder import measure as measure
from torch import Tensor, nn

NAME, METRIC, BATCH = "EfficientNet-Lite0", "cross-entropy", "32 images of 65 x 65"
STEPS, LEARNING_RATE = 60, 1e-4
FORMATS = {
    "int4": "int4 weights per channel, uint8 static inputs",
}
# What was chosen for the language model; but GPTQ moves no convolution, so biases are corrected, on top of
# ranges by min and max; and norms are kept in training.
RECOUP: dict[str, Any] = {
    "recipe": qat_quality_language_model.RECOUP["recipe"],
    "settings": qat_quality_language_model.RECOUP["settings"] | {"batch_norm": {}},
    "gptq samples": 0,
}
SMOOTH: tuple[str, ...] = ()
ROOT = Path(__file__).parent.parent
IMAGES, TEST_IMAGES = 32, 2000
SIZE, MEAN, STD = 65, 0.498, 0.502  # the recipe's


def scheme(format_: str) -> Any:
    """That of w8a8-ort-static, with fewer bits for the weights."""
    from recoup.numerics import IntFormat
    from recoup.schemes import PRESETS

    eight = PRESETS["w8a8-ort-static"]
    grid = IntFormat(int(format_.removeprefix("int")), narrow=True)
    return replace(eight, name=f"{format_} per channel", weights=replace(eight.weights, format=grid))


def prepare(work: Path, steps: int) -> dict[str, str]:
    """Images with their labels, and the float model as a program for training, which runs without recoup."""
    import pyarrow.parquet
    from PIL import Image

    from recoup.tasks.assets import fetch

    data, program = work / f"fashion-{steps}.npz", work / "efficientnet-lite0.pt2"
    if not data.is_file():
        arrays = {}
        for part, seed, count in (("train", 1, steps * IMAGES), ("test", 0, TEST_IMAGES)):
            table = pyarrow.parquet.read_table(fetch("fashion-mnist") / f"{part}.parquet").to_pylist()
            chosen = [table[i] for i in np.random.default_rng(seed).permutation(len(table))[:count]]
            pictures = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in chosen]
            arrays |= {part: np.stack(pictures), f"{part} labels": np.array([row["label"] for row in chosen])}
        work.mkdir(exist_ok=True)
        np.savez(data, **arrays)
    if not program.is_file():
        fine_tune, fine_tuned = recipe()
        fine_tune()
        model = fine_tuned().train()
        example = {"pixel_values": torch.zeros(4, 3, SIZE, SIZE), "labels": torch.zeros(4, dtype=torch.long)}
        any_number = {name: {0: torch.export.Dim("images")} for name in example}
        torch.export.save(torch.export.export(model, (), example, dynamic_shapes=any_number), program)
    return {"model": str(program), "data": str(data)}


def recipe() -> tuple[Callable[[], None], Callable[[], nn.Module]]:
    """What fine-tunes the float model where it is not there yet, and what loads it."""
    from recoup.tasks.custom import entry_point

    module, fine_tuned = entry_point("recipes.efficientnet_fashion_mnist:fine_tuned", ROOT, "qat_quality")
    return module.main, fine_tuned


def load(job: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Model, training batches and test batches; torchao has the program."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(job["data"]).items()}

    def batches(part: str, size: int) -> list[dict[str, Tensor]]:
        both = zip(arrays[part].split(size), arrays[f"{part} labels"].split(size), strict=True)
        return [{"pixel_values": pixel_values(images), "labels": labels} for images, labels in both]

    train, test = batches("train", IMAGES)[: job["steps"]], batches("test", 100)
    if job["tool"] == "torchao":
        return torch.export.load(job["model"]).module(), train, test
    _, fine_tuned = recipe()
    return fine_tuned(), train, test


def pixel_values(images: Tensor) -> Tensor:
    """As the model was trained with: bytes (images, 28, 28) become (images, 3, 65, 65)."""
    shares = images[:, None].float() / 255
    upscaled = F.interpolate(shares, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return ((upscaled - MEAN) / STD).expand(-1, 3, -1, -1)
