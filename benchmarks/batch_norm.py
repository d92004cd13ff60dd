"""QAT with norms folded, and with norms kept inside of the quantizers: a small residual network at 2 bits.

    OMP_NUM_THREADS=1 python benchmarks/batch_norm.py

Trains the float network on 16,000 images of Fashion-MNIST, then for every loss and seed 240 steps of QAT with
and without norms. Counted is the accuracy on 4,000 test images. The stem and the head stay in float.
"""

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import recoup
from recoup.numerics import IntFormat
from recoup.schemes import PRESETS
from recoup.tasks.assets import locate
from recoup.transforms import fuse

BATCH, HELD_OUT, SEEDS = 64, 12, 2
W8A8 = PRESETS["w8a8-static"]
SCHEME = replace(W8A8, name="w2a8-static", weights=replace(W8A8.weights, format=IntFormat(2)))
QAT = {"steps": 240, "learning_rate": 2e-3, "warmup": 10, "evaluate_every": 40}
NORMS = {"folded": None, "kept": {}}


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, section 3.3)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        projection = nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.short(x))


class Net(nn.Module):
    """Three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        logits = self.head(x.mean(dim=(2, 3)))
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def images(part: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels between -1 and 1, and labels."""
    table = pyarrow.parquet.read_table(locate(f"asset:fashion-mnist/{part}.parquet", Path())).to_pylist()
    chosen = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(table[i]["image"]["bytes"]))) for i in chosen])
    labels = torch.tensor([table[i]["label"] for i in chosen])
    return torch.from_numpy(pixels)[:, None].float() / 255 * 2 - 1, labels


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    answers = torch.cat([model.eval()(x)["logits"] for x in test[0].split(500)]).argmax(dim=1)
    return float((answers == test[1]).float().mean())


def trained_in_float(batches: list[dict[str, Tensor]], epochs: int = 4) -> Net:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(batches))
    for batch in batches * epochs:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def prepared(model: Net, batches: list[dict[str, Tensor]]) -> nn.Module:
    model = copy.deepcopy(model)
    recipe = recoup.Recipe(scheme=SCHEME, rules=(recoup.Rule(match="stem", scheme=None),))
    recoup.prepare(fuse(model, batches[0]["x"][:8]), recoup.resolve(model, recipe))
    return recoup.calibrate(model, [batch["x"] for batch in batches[HELD_OUT:][:8]], observer="mse")


def begun() -> tuple[Net, list[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """The network in float, its batches and the test images; prints what it scores, and what calibrated."""
    x, labels = images("train", 16_000, seed=0)
    pairs = zip(x.split(BATCH), labels.split(BATCH), strict=True)
    batches = [{"x": x, "labels": labels} for x, labels in pairs]
    test = images("test", 4_000, seed=1)
    model = trained_in_float(batches)
    calibrated = accuracy(prepared(model, batches), test)
    print(f"float {accuracy(model, test):.4f}, calibrated {calibrated:.4f}\n")
    return model, batches, test


def trained(
    model: Net, batches: list[dict[str, Tensor]], test: tuple[Tensor, Tensor], seed: int, **method: Any
) -> float:
    """The accuracy after a training in the order of this seed."""
    candidate = prepared(model, batches)
    torch.manual_seed(seed)
    order = torch.randperm(len(batches) - HELD_OUT).tolist()
    chosen = [batches[HELD_OUT:][i] for i in order]
    settings = recoup.TrainSettings.model_validate(QAT | method)
    recoup.train(candidate, chosen, settings, held_out=batches[:HELD_OUT])
    return accuracy(candidate, test)


def main() -> None:
    model, batches, test = begun()
    print("| loss | seed | norms | accuracy |\n|---|--:|---|--:|")
    for loss in ("task", "logits-kl"):
        for seed in range(SEEDS):
            for name, batch_norm in NORMS.items():
                found = trained(model, batches, test, seed, loss=loss, batch_norm=batch_norm)
                print(f"| {loss} | {seed} | {name} | {found:.4f} |", flush=True)


if __name__ == "__main__":
    main()
