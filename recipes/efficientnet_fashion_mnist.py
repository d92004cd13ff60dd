"""EfficientNet-Lite0 on Fashion-MNIST: the float model that `efficientnet-fashion-mnist.yaml` quantizes.

    python recipes/efficientnet_fashion_mnist.py

takes the weights published for ImageNet, puts a classifier of ten classes on them, and trains all of it for
one pass over a part of the training images. Minutes on a laptop; at its end the model is in recoup's cache,
and a second call says so.

Every stride here meets an odd number of pixels (65, 33, 17, 9, 5). For those the padding of the published
model, TensorFlow's "SAME", is the same on both sides, so plain convolutions compute that model bit for bit.
"""

import io
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup.progress import watched
from recoup.tasks.assets import cache_folder, locate

SIZE = 65
MEAN, STD = 0.498, 0.502  # of the published weights, for every colour
WEIGHTS = "asset:efficientnet-lite0/model.safetensors"
TRAIN = "asset:fashion-mnist/train.parquet"
CLASSES, IMAGES, BATCH, LEARNING_RATE = 10, 24_000, 32, 2e-3
FINE_TUNED = f"efficientnet-lite0-fashion-mnist-{SIZE}.safetensors"


class Stage(NamedTuple):
    """Blocks alike, but that the first of them strides and changes the width (EfficientNet, table 1)."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without a bias: a BatchNorm follows each of them."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def norm(width: int) -> nn.BatchNorm2d:
    """Epsilon and momentum are TensorFlow's."""
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Inverted residual (MobileNetV2, sec. 3.3): widen, filter each channel, narrow; clipped at 6 between."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expand
        if stage.expand > 1:
            self._expand_conv, self._bn0 = conv(inputs, wide), norm(wide)
        self._depthwise_conv, self._bn1 = conv(wide, wide, stage.kernel, stride, groups=wide), norm(wide)
        self._project_conv, self._bn2 = conv(wide, stage.width), norm(stage.width)
        self.widens = stage.expand > 1
        self.adds = stride == 1 and inputs == stage.width

    def forward(self, x: Tensor) -> Tensor:
        """The equation."""
        wide = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        narrow = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(wide)))))
        return x + narrow if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """Its modules are called as in the published weights, which load strictly."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = conv(3, 32, 3, stride=2), norm(32)
        stages = [(inputs.width, stage) for inputs, stage in pairwise((Stage(0, 0, 0, 0, 32), *STAGES))]
        self._blocks = nn.ModuleList(
            Block(stage.width if index else inputs, stage, 1 if index else stage.stride)
            for inputs, stage in stages
            for index in range(stage.blocks)
        )
        self._conv_head, self._bn1, self._relu6 = conv(320, 1280), norm(1280), nn.ReLU6()
        self._fc = nn.Linear(1280, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the cross-entropy where there are labels; as transformers' classifiers are called."""
        x = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = self._relu6(self._bn1(self._conv_head(x)))  # a module, so that a recipe can name what it returns
        logits = self._fc(x.mean(dim=(2, 3)))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {"logits": logits} | loss


def fine_tuned() -> nn.Module:
    """The float model of the recipe.

    Raises:
        FileNotFoundError: it is not there yet.
    """
    file = cache_folder() / FINE_TUNED
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; run `python recipes/{Path(__file__).name}` first")
    model = EfficientNetLite0(CLASSES)
    model.load_state_dict(load_file(file))
    return model.eval()


def published() -> nn.Module:
    """The published weights under a new classifier."""
    model = EfficientNetLite0(1000)
    model.load_state_dict(load_file(locate(WEIGHTS, Path())))
    model._fc = nn.Linear(1280, CLASSES)
    return model


def images() -> tuple[Tensor, Tensor]:
    """Bytes (IMAGES, 28, 28) and labels, in a random order."""
    table = pyarrow.parquet.read_table(locate(TRAIN, Path())).to_pylist()
    chosen = [table[index] for index in torch.randperm(len(table))[:IMAGES]]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in chosen])
    return torch.from_numpy(pixels), torch.tensor([row["label"] for row in chosen])


def pixel_values(images: Tensor) -> Tensor:
    """What the recipe's preprocessing makes of these images, and half of them mirrored."""
    mirrored = torch.rand(len(images)) < 0.5
    images = torch.where(mirrored[:, None, None], images.flip(-1), images)[:, None].float() / 255
    upscaled = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    colours = ((upscaled - MEAN) / STD).expand(-1, 3, -1, -1)
    return colours.contiguous(memory_format=torch.channels_last)  # trains twice as fast on a CPU


def main() -> None:
    """Fine-tune, and save."""
    file = cache_folder() / FINE_TUNED
    if file.is_file():
        print(f"{file} is there already")
        return
    torch.manual_seed(0)
    model: nn.Module = published().train().to(memory_format=torch.channels_last)
    pixels, labels = images()
    starts = range(0, len(pixels), BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(starts))
    for start in watched(starts, "fine-tuning"):
        batch = slice(start, start + BATCH)
        model(pixel_values(pixels[batch]), labels[batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    unfinished = file.with_suffix(".unfinished")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, unfinished)
    unfinished.rename(file)
    print(file)


if __name__ == "__main__":
    sys.exit(main())
