"""A tiny ResNet of transformers, and what it is exported with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification


def resnet(blocks: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two stages of so many blocks, the second with a projection around its first one; and a batch."""
    torch.manual_seed(0)
    sizes: Any = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [blocks] * 2}
    config = ResNetConfig(num_labels=3, layer_type="basic", **sizes)
    model = ResNetForImageClassification(config).eval()
    return model, {"pixel_values": torch.randn(4, 3, 32, 32)}


class Nothing:
    """Takes the place of an image processor."""

    def save_pretrained(self, folder: Path) -> None:
        assert folder.is_dir()
