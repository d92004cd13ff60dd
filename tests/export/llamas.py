"""Llamas of one layer, and the folders that they become: what the tests of compressed-tensors share."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from recoup import Recipe, Scheme, calibrate, convert, export, prepare, resolve
from recoup.export import TARGETS, Parity
from recoup.nn import CodedLinear
from recoup.numerics import BFLOAT16, FLOAT16, IntFormat, per_channel, per_tensor
from recoup.schemes import PRESETS, preset

TARGET = TARGETS["compressed-tensors"]
WIDTH, WORDS = 128, 16


def _own() -> list[Scheme]:
    """Schemes that no preset has."""
    grouped, fp8 = PRESETS["w4a16"].weights, PRESETS["fp8"]
    static = PRESETS["fp8-static"]
    assert fp8.inputs
    return [
        *(Scheme(name=f"w{b}a16", weights=replace(grouped, format=IntFormat(b))) for b in (5, 6, 7)),
        Scheme(name="w4a16-channels", weights=replace(grouped, granularity=per_channel)),
        Scheme(name="w3a8-channels", weights=replace(grouped, format=IntFormat(3), granularity=per_channel),
               inputs=PRESETS["w4a8"].inputs),
        Scheme(name="w8a16-channels", weights=PRESETS["w8a8"].weights),
        Scheme(name="bfloat16-scales", weights=replace(grouped, scale_format=BFLOAT16)),
        Scheme(name="float16-scales", weights=replace(grouped, scale_format=FLOAT16)),
        Scheme(name="learned", weights=replace(grouped, ranges="learned")),
        Scheme(name="fp8-mixed", weights=fp8.weights, inputs=static.inputs),
        Scheme(name="fp8-tensor", weights=static.weights, inputs=fp8.inputs),
        Scheme(name="w8a8-tensor", weights=replace(PRESETS["w8a8"].weights, granularity=per_tensor),
               inputs=PRESETS["w8a8"].inputs),
        Scheme(name="mxfp8a16", weights=PRESETS["mxfp8"].weights),
    ]  # fmt: skip


NAMES = [
    *(
        "w2a16",
        "w3a16",
        "w4a16",
        "w8a16",
        "w4a16-g128",
        "w2a8",
        "w3a8",
        "w4a8",
        "w4afp8",
        "w4afp8-g128",
        "w8a8",
        "w8a8-static",
    ),
    *("fp8", "fp8-static", "fp8-block", "mxfp8", "mxfp4", "mxfp4a16", "nvfp4", "nvfp4a16"),
]
SCHEMES = {scheme.name: scheme for scheme in (*map(preset, NAMES), *_own())}
FORMATS = {
    "int-quantized": {"w8a8", "w8a8-static", "w8a8-tensor"},
    "float-quantized": {"fp8", "fp8-static", "fp8-block", "fp8-mixed", "fp8-tensor"},
    "mxfp8-quantized": {"mxfp8", "mxfp8a16"},
    "mxfp4-pack-quantized": {"mxfp4", "mxfp4a16"},
    "nvfp4-pack-quantized": {"nvfp4", "nvfp4a16"},
}
TIED = ["w4a16", "w8a8", "fp8", "mxfp8", "mxfp4", "nvfp4"]  # one of each storage format


def llama(*, tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,  # several blocks of 128 x 128
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def batch(samples: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, WORDS, (samples, 8))}


def calibrated(scheme: Scheme | str | Recipe, *, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = llama(tied=tied)
    return calibrate(prepare(model, resolve(model, scheme)), [batch()], observer="minmax")


def quantized(scheme: Scheme | str | Recipe, *, tied: bool = False) -> nn.Module:
    """Prepared, calibrated, settled."""
    return TARGET.settle(calibrated(scheme, tied=tied))


class Processor:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder, and the converted model it was written from."""

    model: nn.Module
    folder: Path
    parity: Parity

    @property
    def coded(self) -> dict[str, CodedLinear]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, CodedLinear)}

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


def written(scheme: Scheme | str | Recipe, folder: Path, *, tied: bool = False) -> Written:
    model = quantized(scheme, tied=tied)
    parity = export(model, folder, "compressed-tensors", processor=Processor())
    return Written(model=convert(model), folder=folder, parity=parity)
