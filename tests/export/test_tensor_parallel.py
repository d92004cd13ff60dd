"""What vLLM would cut on several devices is refused before any work."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from recoup import Recipe, Scheme, resolve
from recoup.export import preflight
from recoup.export.tensor_parallel import parts
from recoup.nn import CodedLinear
from recoup.numerics import IntFormat, per_channel
from recoup.schemes import PRESETS

SIZES: dict[str, Any] = {"vocab_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}


def llama(**others: Any) -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(SIZES | sizes | others)))


def phi(**others: Any) -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    return Phi3ForCausalLM(Phi3Config(**(SIZES | sizes | others)))


CHANNELS = {
    bits: Scheme(
        name=f"w{bits}-channels",
        weights=replace(PRESETS["w4a16"].weights, format=IntFormat(bits), granularity=per_channel),
    )
    for bits in (3, 4, 8)
}
DOWN, KEYS = r"^model\.layers\.0\.mlp\.down_proj: ", r"^model\.layers\.0\.self_attn\.k_proj: "
REFUSED: dict[str, tuple[nn.Module, Scheme | str, int, str]] = {
    "a group": (
        llama(), "w4a16-g128", 4,
        DOWN + r"768 columns cannot be split into whole groups of 128 on 4 devices; split it over 1, 2, "),
    "a block of one head": (llama(), "fp8-block", 4, KEYS + r"128 rows cannot be split into whole blocks"),
    "a block's rows": (
        llama(hidden_size=1024), "fp8-block", 4,
        r"gate_proj: 768 rows cannot be split into whole blocks of 128 on 4 devices; split it over 1, 2, or"),
    "packed words": (
        llama(intermediate_size=544), CHANNELS[3], 8,
        DOWN + r"68 codes of 3 bits do not fill words of 32 on 8 devices; split it over 1, or "),
    "columns": (
        llama(intermediate_size=513), CHANNELS[8], 2, "gate_proj: 513 rows cannot be split into whole"),
    "heads": (llama(), "w4a16", 3, r"^export\.tensor_parallel: 8 heads of queries cannot be dealt"),
    "shared heads": (
        llama(num_attention_heads=16, num_key_value_heads=16, hidden_size=512), "w4a16", 32,
        "16 heads of queries cannot"),
    "heads of keys": (
        llama(num_attention_heads=12, num_key_value_heads=3, hidden_size=768), "w4a16", 4,
        "3 heads of keys and values cannot be dealt to 4 devices"),
    "blocks of joined heads": (
        phi(hidden_size=256, num_key_value_heads=1), "fp8-block", 2,
        "qkv_proj: 64 rows cannot be split into whole blocks of 128 on 2 devices; split it over 1, or"),
    "joined columns": (
        phi(intermediate_size=513), CHANNELS[8], 2, "gate_up_proj: 513 rows cannot be split into whole"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "scheme", "devices", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_cut_is_refused(
    model: nn.Module, scheme: Scheme | str, devices: int, message: str
) -> None:
    plan = resolve(model, scheme)
    with pytest.raises(ValueError, match=message) as error:
        preflight(model, plan, "compressed-tensors", tensor_parallel=devices)
    assert "\n" not in str(error.value)


def test_a_model_that_transformers_has_no_plan_for_is_refused() -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    rules = [{"match": "*.embed_positions", "scheme": "none"}]
    model = OPTForCausalLM(OPTConfig(**SIZES, **sizes))
    plan = resolve(model, Recipe.model_validate({"scheme": "w4a16", "rules": rules}))
    with pytest.raises(ValueError, match=r"^export\.tensor_parallel: transformers has no tp_plan for OPTFor"):
        preflight(model, plan, "compressed-tensors", tensor_parallel=2)


RUNS: dict[str, tuple[nn.Module, Scheme | str, int]] = {
    "groups": (llama(), "w4a16-g128", 2),
    "smaller groups": (llama(), "w4a16", 4),
    "more devices than heads of keys": (llama(intermediate_size=1024), "w4a16", 8),
    "words": (llama(intermediate_size=1024), CHANNELS[3], 4),
    "channels": (llama(), CHANNELS[4], 4),
    "tensors": (llama(), "fp8-static", 8),
    "blocks": (llama(hidden_size=1024, intermediate_size=1024), "fp8-block", 4),
    "joined matrices": (phi(), "w4a16", 2),
    "joined blocks": (phi(hidden_size=256), "fp8-block", 2),
    "joined heads that are repeated": (phi(num_key_value_heads=1), "w4a16", 4),
}


@pytest.mark.parametrize(("model", "scheme", "devices"), RUNS.values(), ids=RUNS)
def test_whole_parts_are_let_through(model: nn.Module, scheme: Scheme | str, devices: int) -> None:
    kernels = preflight(model, resolve(model, scheme), "compressed-tensors", tensor_parallel=devices)
    assert kernels
    assert all(name.endswith("-quantized") for name in kernels.values())


@pytest.mark.parametrize("target", ["onnx", "pytorch", "gguf"])
def test_other_targets_run_on_one_device(target: str) -> None:
    model = llama(hidden_size=64, intermediate_size=64)
    plan = resolve(model, "q8_0" if target == "gguf" else "w8a8")
    with pytest.raises(
        ValueError, match=r"^export\.tensor_parallel: 2 devices asked, this target runs on one"
    ):
        preflight(model, plan, target, tensor_parallel=2)


PARTS: dict[str, tuple[nn.Module, int, dict[str, tuple[int, int]]]] = {
    "one device": (llama(), 1, {"q_proj": (768, 512), "gate_proj": (1536, 512), "down_proj": (512, 768)}),
    "heads": (llama(), 2, {"k_proj": (384, 512), "o_proj": (512, 256), "up_proj": (768, 512)}),
    "heads that are repeated": (llama(), 4, {"v_proj": (128 + 2 * 64, 512), "down_proj": (512, 192)}),
    "joined": (phi(num_key_value_heads=2), 4, {"qkv_proj": (32 + 2 * 32, 128), "gate_up_proj": (128, 128)}),
}


@pytest.mark.parametrize(("model", "devices", "expected"), PARTS.values(), ids=PARTS)
def test_a_device_multiplies_by_joined_parts(
    model: nn.Module, devices: int, expected: dict[str, tuple[int, int]]
) -> None:
    plan = resolve(model, "w4a16")
    found = parts(model, {path: (plan[path], CodedLinear) for path in plan.modules}, devices)
    assert {name.rpartition(".")[2]: part for name, part in found.items()}.items() >= expected.items()


def test_blocks_of_joined_matrices_are_whole_on_one_device_too() -> None:
    model = phi(hidden_size=256, num_key_value_heads=1)
    plan = resolve(model, "fp8-block")
    with pytest.raises(ValueError, match=r"qkv_proj: a matrix in it has 64 rows, .*; take fp8, which"):
        preflight(model, plan, "compressed-tensors", consumer="vllm")
    assert preflight(model, plan, "compressed-tensors", consumer="transformers")


def test_a_part_that_no_kernel_takes_is_refused_for_the_releases_that_do_not_pad() -> None:
    model = llama()
    plan = resolve(model, "w4a16")
    message = DOWN + r"vllm 0\.20 has no kernel in bfloat16 .* \(512 x 192 on every GPU\)"
    with pytest.raises(ValueError, match=message):
        preflight(model, plan, "compressed-tensors", tensor_parallel=4, consumer="vllm>=0.20")
    for consumer, devices in (("vllm>=0.24", 4), ("vllm>=0.20", 2)):
        assert preflight(model, plan, "compressed-tensors", tensor_parallel=devices, consumer=consumer)


def test_the_kernel_is_that_of_the_part() -> None:
    model = llama(intermediate_size=1024)
    plan = resolve(model, "w4a16-g64")
    computed = {
        devices: preflight(
            model, plan, "compressed-tensors", tensor_parallel=devices, consumer="vllm", gpu="hopper"
        )["model.layers.0.self_attn.q_proj"]
        for devices in (1, 8)
    }
    assert "Machete" in computed[1]
    assert "Humming" in computed[8]  # 192 rows
