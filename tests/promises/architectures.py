"""Tiny models of transformers, built from their configs: one of each family of architectures.

`ARCHITECTURES` is a table: a row is tested by every promise in `test_architectures.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WORDS, IMAGE = 32, 30
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GRID: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 8, "in_channels": 3}
MARKS: dict[str, int] = {
    "image_token_id": IMAGE, "video_token_id": 29, "vision_start_token_id": 28, "vision_end_token_id": 27
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 27, (2, 6))}


def both() -> dict[str, Tensor]:
    return {**words(), "decoder_input_ids": torch.randint(3, 27, (2, 4))}


def images(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800)}


def spectra() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": torch.randint(3, 27, (2, 4))}


def picture_and_words() -> dict[str, Tensor]:
    """Four places for the patches of an image, and words after them."""
    ids = torch.tensor([[1, *[IMAGE] * 4, 5, 6, 7]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


def patches_and_words() -> dict[str, Tensor]:
    """One place for four merged patches, which come as rows."""
    ids = torch.tensor([[1, 28, IMAGE, 27, 5, 6, 7]])
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(4, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def of(config: str, model: str, **fields: Any) -> Callable[[], nn.Module]:
    """Builds the model of that class from a config of that one."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**fields))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**PICTURE, "num_hidden_layers": 2}),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen(kind: str, vision: dict[str, Any]) -> Callable[[], nn.Module]:
    text = {**TEXT, "rope_scaling": ROPE, "rope_parameters": ROPE}
    return of(
        f"{kind}Config", f"{kind}ForConditionalGeneration", text_config=text, vision_config=vision, **MARKS
    )


Row = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]
LANGUAGE_AND_VISION: dict[str, Row] = {
    "llava": (llava, picture_and_words),
    "qwen2-vl": (
        qwen("Qwen2VL", {**GRID, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}), patches_and_words
    ),
    "qwen2.5-vl": (
        qwen(
            "Qwen2_5_VL",
            {**GRID, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 16},
        ),
        patches_and_words,
    ),
    "qwen3-vl": (
        qwen(
            "Qwen3VL",
            {
                **GRID, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
        ),
        patches_and_words,
    ),
}  # fmt: skip
ARCHITECTURES: dict[str, Row] = {
    "llama4, stacks of experts": (
        of(
            "Llama4TextConfig", "Llama4TextModel",
            **TEXT, intermediate_size_mlp=64, num_local_experts=2, interleave_moe_layer_step=1,
        ),
        words,
    ),
    "jetmoe, parallel experts": (
        of(
            "JetMoeConfig", "JetMoeModel", **TEXT, num_local_experts=2, num_experts_per_tok=1, kv_channels=16
        ),
        words,
    ),
    "mamba, a state space": (
        of("MambaConfig", "MambaModel", vocab_size=WORDS, hidden_size=128, state_size=4, num_hidden_layers=1),
        words,
    ),
    "recurrent gemma": (
        of(
            "RecurrentGemmaConfig", "RecurrentGemmaModel",
            **{**TEXT, "num_hidden_layers": 3}, lru_width=32, attention_window_size=8,
        ),
        words,
    ),
    "t5, an encoder and a decoder": (
        of("T5Config", "T5Model", vocab_size=WORDS, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
        both,
    ),
    "xlnet, einsums": (
        of("XLNetConfig", "XLNetModel", vocab_size=WORDS, d_model=32, n_layer=1, n_head=2, d_inner=64), words
    ),
    "siglip, pooled by torch's attention": (of("SiglipVisionConfig", "SiglipVisionModel", **PICTURE), images),
    "swin, windows": (
        of("SwinConfig", "SwinModel", image_size=16, patch_size=2, embed_dim=32, depths=[1], num_heads=[2],
           window_size=4),
        images,
    ),
    "convnext": (
        of("ConvNextConfig", "ConvNextModel", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), images
    ),
    "bit, standardized weights": (
        of("BitConfig", "BitModel", embedding_size=16, hidden_sizes=[32], depths=[1], num_groups=4), images
    ),
    "wav2vec 2.0, weight norm": (
        of(
            "Wav2Vec2Config", "Wav2Vec2Model",
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
        ),
        sound,
    ),
    "whisper": (
        of(
            "WhisperConfig", "WhisperModel",
            vocab_size=WORDS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16,
            max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        spectra,
    ),
    **LANGUAGE_AND_VISION,
}  # fmt: skip
