"""Write the golden folders of a format, with the code of the version that has it.

    PYTHONPATH=src python -m tests.export.artefacts.write 1

For every target a small model, and beside its folder a file with a batch, the engine's answers to it, and
how far another processor's may be from them. They stay as they are: whoever raises `FORMAT` adds a folder
with the new number, and a migration that reads the old ones. Format 0 was written at 49f3294, before there
was artefact.json.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
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


def llama(words: int = 24) -> nn.Module:
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


_RULES = {"table": "w4a16", "along": "w8a8-static", "integers": "w8a8", "head": "none"}
MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, str]]] = {
    "onnx": (Layers, "w4a16", _RULES),
    "onnx-qdq": (Layers, "w4a16", _RULES),
    "pytorch": (Two, "w4a16", {"table": "w4a16", "integers": "w8a8"}),
    "compressed-tensors": (llama, "w4a16", {}),
    "gguf": (llama, "q4_0", {}),
}


def write(target: str, folder: Path) -> None:
    torch.manual_seed(0)
    make, scheme, rules = MODELS[target]
    model, ids = make(), torch.randint(3, 16, (2, 6))
    recipe = {"scheme": scheme, "rules": [{"match": path, "scheme": name} for path, name in rules.items()]}
    batch: Any = {"input_ids": ids} if make is llama else {"ids": ids}
    calibrate(prepare(model, resolve(model, Recipe.model_validate(recipe))), [batch])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the artefact has no tokenizer")
        export(model, folder, target, example=batch)
    converted = convert(model).eval()
    with torch.no_grad(), quantization_off(converted):
        plain = logits(call(converted, batch))
    with torch.no_grad():
        trained, answers = logits(call(converted, batch)), logits(call(TARGETS[target].load(folder), batch))
    # Rounding may flip the code of an input; then two runs are as far apart as quantizing inputs takes them.
    allowed = _ROUNDING + 2 * float((trained - plain).norm() / plain.norm())
    found = {"ids": ids, "answers": answers.contiguous(), "allowed": torch.tensor(allowed)}
    save_file(found, folder.with_suffix(".safetensors"))


def logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs


if __name__ == "__main__":
    for target in MODELS:
        write(target, HERE / f"format-{int(sys.argv[1])}" / target)
