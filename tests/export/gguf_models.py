"""Small language models of every architecture that llama.cpp runs, and the files that they become."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from recoup import Recipe, Scheme, calibrate, convert, export, prepare, resolve
from recoup.export import TARGETS, Parity
from recoup.schemes import PRESETS

TARGET = TARGETS["gguf"]
WORDS = 40
NAMES = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "mxfp4-gguf": "MXFP4", "tq2_0": "TQ2_0"}
_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # probabilities that differ from each other
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
_WIDE = {"hidden_size": 256, "intermediate_size": 256}  # a block of TQ2_0
_NARROW = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _WIDE | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (LlamaForCausalLM, LlamaConfig, _WIDE | {"tie_word_embeddings": True}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama stretched": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LINEAR}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 32, "head_dim": 32}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"num_hidden_layers": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 32}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _NARROW | {"num_hidden_layers": 2}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _NARROW | {"num_hidden_layers": 6}),
}


def small(name: str = "llama", **others: Any) -> PreTrainedModel:
    """Random, with norms and biases that are not all the same."""
    kind, config, own = MODELS[name]
    model = kind(config(**(_SIZES | own | others)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(samples: int = 2, tokens: int = 8) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (samples, tokens))}


def quantized(scheme: Scheme | str | Recipe | dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    """Prepared and calibrated."""
    model = small() if model is None else model
    if isinstance(scheme, str) and "Gemma" in type(model).__name__:  # its embedding has no quantized form
        scheme = {"scheme": scheme, "rules": [{"match": "model.embed_tokens", "scheme": "none"}]}
    recipe = Recipe.model_validate(scheme) if isinstance(scheme, dict) else scheme
    return calibrate(prepare(model, resolve(model, recipe)), [batch()], observer="minmax")


def table(name: str) -> Scheme:
    """A preset's weights for an embedding, whose inputs are ids."""
    return replace(PRESETS[name], name=f"{name}-table", inputs=None)


def whole(name: str, table_name: str) -> dict[str, Any]:
    """A recipe that quantizes embedding and output, too."""
    return {
        "scheme": name,
        "rules": [
            {"match": "model.embed_tokens", "scheme": table(table_name)},
            {"match": "lm_head", "scheme": table_name},
        ],
    }


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder, and the converted model it was written from."""

    model: nn.Module
    folder: Path
    parity: Parity


def written(
    scheme: Scheme | str | Recipe | dict[str, Any],
    folder: Path,
    model: nn.Module | None = None,
    **options: Any,
) -> Written:
    prepared = quantized(scheme, model)
    return Written(parity=export(prepared, folder, "gguf", **options), folder=folder, model=convert(prepared))
