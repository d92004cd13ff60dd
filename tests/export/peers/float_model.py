"""The model that every peer quantized: one layer of a Llama, random, in bfloat16.

python -m tests.export.peers.float_model        writes tests/export/peers/float
"""

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FLOAT = HERE / "float"
WORDS = 64
RECORDED = ("k_proj", "down_proj")  # wide and narrow, enough to see every axis
ROWS = 3  # every so many


def write() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(FLOAT)


def tokenizer() -> Any:
    """Some tools ask for one, and none is needed: a token is a number."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{word}>": word for word in range(WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>", eos_token="<2>")


def weights_of(model: Any) -> dict[str, Any]:
    """The weight of every module, by its path."""
    return {path: module.weight for path, module in model.named_modules() if hasattr(module, "weight")}


def record(weights: dict[str, Any], folder: Path) -> None:
    """Beside a folder, the dense weights of some layers that a tool says it holds."""
    import torch
    from safetensors.torch import save_file

    kept = {path: weight for path, weight in weights.items() if path.endswith(RECORDED)}
    found = {path: weight.detach()[::ROWS].to(torch.float32).contiguous() for path, weight in kept.items()}
    save_file(found, folder.with_suffix(".safetensors"))


if __name__ == "__main__":
    write()
