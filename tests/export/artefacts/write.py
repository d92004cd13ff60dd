"""Write the golden folders of a format, with the code of the version that has it.

    PYTHONPATH=src python -m tests.export.artefacts.write 1
    PYTHONPATH=src python -m tests.export.artefacts.write 1 onnx-decoding

For every target a small model, for what only some artefacts have another, and beside its folder a file with
a batch (`ids`), the engine's answers to it, and how far another processor's may be from them. They stay as
they are: whoever raises `FORMAT` adds a folder with the new number, and a migration that reads the old ones.
Format 0 was written at 49f3294, before there was artefact.json.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from recoup import Recipe, calibrate, convert, export, prepare, resolve
from recoup.export import TARGETS
from recoup.nn import call, quantization_off

HERE = Path(__file__).parent
_ROUNDING = 1e-5  # relative: float32 sums of up to 96 terms, 2^-24 * sqrt(96) each, in a few layers


class Layers(nn.Module):
    """An embedding, a convolution, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.along = nn.Conv1d(32, 32, 3, padding=1)
        self.blocks = nn.Linear(32, 64)
        self.integers = nn.Linear(64, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.along(self.table(ids).mT)).mT
        return self.head(torch.tanh(self.integers(torch.tanh(self.blocks(x)))))


class Two(nn.Module):
    """An embedding and a linear layer: programs of torch.export are long."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.integers = nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.integers(self.table(ids))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Image(nn.Module):
    """Convolutions and a sum, which can all be computed in codes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(2, 4, 3, padding=1), Block(), nn.Conv2d(4, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.block(self.stem(image))).mean(dim=(2, 3))


def llama(words: int = 24, *, width: int = 64, decodes: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=decodes,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A folder of every format.

    Args:
        batch: the name of the model's input.
        recipe: what is quantized.
        since: the first format that it has been written in.
        checks: what is verified of it beyond files, codes, modules and outputs.
    """

    target: str
    make: Callable[[], nn.Module]
    batch: str
    recipe: dict[str, Any]
    since: int = 0
    checks: tuple[str, ...] = ()


def _mixed(scheme: str, **rules: str) -> dict[str, Any]:
    return {"scheme": scheme, "rules": [{"match": path, "scheme": name} for path, name in rules.items()]}


_LAYERS = _mixed("w4a16", table="w4a16", along="w8a8-static", integers="w8a8", head="none")
MODELS = {
    "onnx": Golden(target="onnx", make=Layers, batch="ids", recipe=_LAYERS),
    "onnx-decoding": Golden(
        target="onnx", make=lambda: llama(width=32, decodes=True), batch="input_ids",
        recipe=_mixed("w4a16"), since=1, checks=("generation",),
    ),
    "onnx-integers": Golden(
        target="onnx", make=Image, batch="image", since=1,
        recipe={"scheme": "w7a8-ort-static", "outputs": ["stem", "block", "block.second", "last"]},
    ),
    "onnx-qdq": Golden(target="onnx-qdq", make=Layers, batch="ids", recipe=_LAYERS),
    "pytorch": Golden(
        target="pytorch", make=Two, batch="ids", recipe=_mixed("w4a16", table="w4a16", integers="w8a8")
    ),
    "compressed-tensors": Golden(
        target="compressed-tensors", make=llama, batch="input_ids", recipe=_mixed("w4a16")
    ),
    "compressed-tensors-kv": Golden(
        target="compressed-tensors", make=lambda: llama(width=32), batch="input_ids",
        recipe={"scheme": "fp8", "kv": "fp8"}, since=1, checks=("cache",),
    ),
    "gguf": Golden(target="gguf", make=llama, batch="input_ids", recipe=_mixed("q4_0")),
}  # fmt: skip


def write(golden: Golden, folder: Path) -> None:
    torch.manual_seed(0)
    target, model = TARGETS[golden.target], golden.make()
    ids = torch.randn(2, 2, 6, 6) if golden.batch == "image" else torch.randint(3, 16, (2, 6))
    batch: Any = {golden.batch: ids}
    prepare(model, resolve(model, Recipe.model_validate(golden.recipe)))
    target.settle(calibrate(model, [batch]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the artefact has no tokenizer")
        export(model, folder, golden.target, example=batch)
    converted = convert(model).eval()
    with torch.no_grad(), quantization_off(converted):
        plain = logits(call(converted, batch))
    with torch.no_grad():
        trained, answers = logits(call(converted, batch)), logits(call(target.load(folder), batch))
    # Rounding may flip the code of an input; then two runs are as far apart as quantizing inputs takes them.
    allowed = _ROUNDING + 2 * float((trained - plain).norm() / plain.norm())
    found = {"ids": ids, "answers": answers.contiguous(), "allowed": torch.tensor(allowed)}
    save_file(found, folder.with_suffix(".safetensors"))


def logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs


if __name__ == "__main__":
    number, *names = sys.argv[1:]
    for name in names or MODELS:
        write(MODELS[name], HERE / f"format-{int(number)}" / name)
