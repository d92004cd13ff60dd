"""Which models llama.cpp runs, and how a file describes one: names, hyper-parameters, the order of rows.

A file says little of what a model computes; that is in llama.cpp's code, chosen by the architecture's name.
So what the code does not do is refused here: another activation, another pattern of windows, another
rotation. Checked against llama.cpp's converter (conversion/*.py) and its graphs (src/models/*.cpp).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import CodedEmbedding, CodedLinear

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp computes under a name.

    Args:
        name: in the file.
        interleaved: rotary pairs are neighbours in a head, not half a head apart as in transformers.
        norm_shift: added to the weights of norms in the file, where transformers adds it in the forward pass.
        activation: of the feed-forward layers.
        biases: of attention and feed-forward layers are read where there are any.
        always_tied: the output matrix is the embedding.
        frequencies: rotary frequencies may be stretched one by one.
        partial: the rotation may leave out the end of a head.
        windows: every so many layers attend to everything, the others to a window; 1 for no windows.
        attention_scale_of: layers of the one model whose attention is scaled by hidden size / heads.
    """

    name: str
    interleaved: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    biases: bool = False
    always_tied: bool = False
    frequencies: bool = False
    partial: bool = False
    windows: int = 1
    attention_scale_of: int | None = None


_LLAMA = Architecture(name="llama", interleaved=True, biases=True, frequencies=True)
_GELU = "gelu_pytorch_tanh"
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": Architecture(name="smollm3", interleaved=True, biases=True),
    "Qwen2ForCausalLM": Architecture(name="qwen2"),
    "Qwen3ForCausalLM": Architecture(name="qwen3"),
    "Phi3ForCausalLM": Architecture(name="phi3", partial=True),
    "GemmaForCausalLM": Architecture(name="gemma", norm_shift=1.0, activation=_GELU, always_tied=True),
    "Gemma2ForCausalLM": Architecture(
        name="gemma2", norm_shift=1.0, activation=_GELU, always_tied=True, windows=2, attention_scale_of=46
    ),
    "Gemma3ForCausalLM": Architecture(
        name="gemma3", norm_shift=1.0, activation=_GELU, windows=6, attention_scale_of=62
    ),
}


def architecture(model: nn.Module) -> Architecture:
    """What llama.cpp calls this model.

    Raises:
        ValueError: nothing; names those that it knows.
    """
    name = type(model).__name__
    if name not in ARCHITECTURES or getattr(model, "config", None) is None:
        raise ValueError(f"gguf: no llama.cpp architecture for {name}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def check(model: nn.Module) -> None:
    """Does llama.cpp compute what this model computes?

    Raises:
        ValueError: it does not; names what differs.
    """
    found, config = architecture(model), _config(model)
    known: Any = {"activation": found.activation}
    asked: Any = {"activation": getattr(config, "hidden_activation", None) or config.hidden_act}
    if found.windows > 1:
        known["layer_types"] = _layer_types(config.num_hidden_layers, found.windows)
        asked["layer_types"] = list(config.layer_types)
    if found.attention_scale_of is not None:
        whole = config.num_hidden_layers == found.attention_scale_of
        known["query_pre_attn_scalar"] = (
            config.hidden_size // config.num_attention_heads if whole else config.head_dim
        )
        asked["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    if found.name == "gemma3":
        known["final_logit_softcapping"] = asked["final_logit_softcapping"] = None
        asked["final_logit_softcapping"] = config.final_logit_softcapping
    if found.name == "smollm3":
        known["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
        asked["no_rope_layers"] = list(config.no_rope_layers)
    for what, value in known.items():
        if asked[what] != value:
            raise ValueError(
                f"gguf: {what} is {asked[what]}, llama.cpp computes {found.name} with {value}; export to "
                "onnx or compressed-tensors"
            )
    _check_rotation(found, config)
    if found.always_tied and not is_tied(model):
        raise ValueError(
            f"gguf: {HEAD} is not tied to {EMBEDDING}, llama.cpp's {found.name} has no output matrix of its "
            "own; bring it tied and without untie, or export to onnx or compressed-tensors"
        )
    _check_names(model, found)


def names(model: nn.Module) -> dict[str, str]:
    """The file's name of every tensor, by the model's name; a tied output matrix has none.

    A quantized weight goes by the name of the float one.
    """
    import gguf

    found = architecture(model)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    table = gguf.get_tensor_name_map(kind, _config(model).num_hidden_layers)
    skipped = {f"{HEAD}.weight"} if is_tied(model) else set[str]()
    tensors = [name for name in _tensors(model) if name not in skipped]
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) or "" for name in tensors}


def is_tied(model: nn.Module) -> bool:
    """The output matrix is the embedding: one tensor, or the same codes and scales."""
    table, head = model.get_submodule(EMBEDDING), model.get_submodule(HEAD)
    if isinstance(table, CodedEmbedding) and isinstance(head, CodedLinear):
        one, other = dict(table.weight.named_buffers()), dict(head.weight.named_buffers())
        same = table.weight.spec == head.weight.spec and one.keys() == other.keys()
        return same and all(torch.equal(one[name], other[name]) for name in one)
    return table.weight is head.weight


def heads(model: nn.Module, path: str) -> int | None:
    """How many heads the rows of this tensor are, if the file has them in another order."""
    if not architecture(model).interleaved:
        return None
    config, layer = _config(model), path.rpartition(".")[0]
    by_layer = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return by_layer.get(layer.rpartition(".")[2])


def shift(model: nn.Module, path: str) -> float:
    """What the file's tensor has more than the model's."""
    return architecture(model).norm_shift if path.endswith("norm.weight") else 0.0


def describe(model: nn.Module, writer: Any) -> None:
    """Hyper-parameters into the file's metadata.

    Args:
        model: a model that `check` let through.
        writer: a `gguf.GGUFWriter`.
    """
    import gguf

    found, config = architecture(model), _config(model)
    longest, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if found.windows > 1:
        writer.add_sliding_window(window)
    elif window is not None:
        longest = min(longest, window)  # llama.cpp attends to everything, which is the same within one window
    writer.add_context_length(longest)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    rotation = _rotation(config)
    writer.add_rope_dimension_count(int(_head_width(config) * rotation.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rotation["rope_theta"])
    if rotation["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotation["factor"])
    if found.name == "gemma3":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if found.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def frequency_factors(model: nn.Module) -> Tensor | None:
    """By how much every rotary frequency is slower than the base says (half a head,); None for not at all."""
    rotation = _rotation(_config(model))
    if rotation["rope_type"] != "llama3":
        return None
    rotary: Any = model.get_submodule("model.rotary_emb")
    slowed = rotary.inv_freq.double()
    exponents = torch.arange(len(slowed), dtype=torch.float64) / len(slowed)
    return (rotation["rope_theta"] ** -exponents / slowed).float()


def _config(model: nn.Module) -> Any:
    return model.config


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotation(config: Any) -> dict[str, Any]:
    """Of the layers that attend to everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _layer_types(layers: int, windows: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % windows else "full_attention" for layer in range(layers)]


def _check_rotation(found: Architecture, config: Any) -> None:
    rotation = _rotation(config)
    kinds = ("default", "linear", *(("llama3",) if found.frequencies else ()))
    if rotation["rope_type"] not in kinds:
        raise ValueError(
            f"gguf: rope_type is {rotation['rope_type']!r}, which is not written for {found.name}; "
            f"there are {', '.join(kinds)}"
        )
    near = config.rope_parameters.get("sliding_attention", {"rope_type": "default"})
    if near["rope_type"] != "default":
        raise ValueError(
            f"gguf: rope_type of sliding_attention is {near['rope_type']!r}, llama.cpp's {found.name} "
            "scales the others alone; there is default"
        )
    if rotation.get("partial_rotary_factor", 1.0) != 1.0 and not found.partial:
        raise ValueError(
            f"gguf: partial_rotary_factor is {rotation['partial_rotary_factor']}, llama.cpp's {found.name} "
            "rotates whole heads"
        )


def _check_names(model: nn.Module, found: Architecture) -> None:
    for name, stored in names(model).items():
        attention = found.name == "qwen2" and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        if not stored or (name.endswith(".bias") and not (found.biases or attention)):
            raise ValueError(f"gguf: llama.cpp's {found.name} has no place for {name}; export to onnx")


def _tensors(model: nn.Module) -> Iterator[str]:
    """Every stored tensor; a quantized weight by one name."""
    coded = [path for path, m in model.named_modules() if isinstance(m, (CodedLinear, CodedEmbedding))]
    inside = tuple(f"{path}.{part}." for path in coded for part in ("weight", "input_quantizer"))
    yield from (f"{path}.weight" for path in coded)
    yield from (name for name in model.state_dict() if not inside or not name.startswith(inside))
