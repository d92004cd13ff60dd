"""Tiny mixture-of-experts models of transformers: common ones, and one for each layout of experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

WORDS, EXPERTS = 16, 4
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3MoeConfig(**SIZES, num_experts=EXPERTS),
    "qwen2, shared expert": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=EXPERTS, shared_expert_intermediate_size=64
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=EXPERTS),
    "deepseek": lambda: DeepseekV3Config(**{**SIZES, **LATENT}, n_routed_experts=EXPERTS, n_shared_experts=1),
    "gpt-oss, transposed": lambda: GptOssConfig(**SIZES, num_local_experts=EXPERTS),
    "nemotron, no gate": lambda: NemotronHConfig(
        **{name: size for name, size in SIZES.items() if name != "num_hidden_layers"},
        layers_block_type=["moe"],
        n_routed_experts=EXPERTS,
        moe_shared_expert_intermediate_size=32,
    ),
}


def mixture(name: str = "qwen3") -> PreTrainedModel:
    """A float model with weights that tell experts apart, whose experts run one at a time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (2, 8))}


def experts_of(model: nn.Module) -> tuple[str, Any]:
    """The model's only layer of experts, float or prepared."""
    return next((name, module) for name, module in model.named_modules() if name.endswith(".experts"))
