"""What llama.cpp does not compute is refused before any work, with the name and the remedy."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from recoup import Recipe, Scheme, export, resolve
from recoup.export import preflight
from recoup.numerics import FLOAT32, IntFormat, QuantSpec, per_group
from recoup.schemes import PRESETS

from .gguf_models import batch, quantized, small, table

Q8_0, Q4_0, Q4_1 = PRESETS["q8_0"], PRESETS["q4_0"], PRESETS["q4_1"]
_OTHERS = "or another of q8_0, q4_0, q4_1, mxfp4-gguf, tq2_0"


def refused(model: nn.Module, recipe: Any, message: str) -> None:
    if isinstance(recipe, (str, Scheme)):
        recipe = {"scheme": recipe}
    with pytest.raises(ValueError, match=message) as error:
        preflight(model, resolve(model, Recipe.model_validate(recipe)), "gguf")
    assert "\n" not in str(error.value)


SCHEMES: dict[str, tuple[Scheme | str, str]] = {
    "w8a16": ("w8a16", rf"int8 per g32, static \(half-range\) weights; use q8_0, {_OTHERS}"),
    "w4a16": ("w4a16", f"weights; use q4_0, {_OTHERS}"),
    "w2a16": ("w2a16", f"weights; use tq2_0, {_OTHERS}"),
    "w8a8": ("w8a8", "int8 .* weights; use q8_0"),
    "fp8": ("fp8", "weights; use q8_0, q4_0, q4_1, mxfp4-gguf, tq2_0$"),
    "nvfp4": ("nvfp4", f"weights; use mxfp4-gguf, {_OTHERS}"),
    "mxfp4": (
        "mxfp4", "has e2m1 .* inputs, but llama.cpp multiplies MXFP4 weights by int8 .* use mxfp4-gguf"),
    "float inputs": (
        replace(Q8_0, name="mine", inputs=None), " has float inputs, but .* Q8_0 weights by .* q8_0"),
    "other inputs": (
        replace(Q4_0, name="mine", inputs=PRESETS["w4a8"].inputs), " has int8 per row, .* use q4_0"),
    "float32 scales": (
        replace(Q4_0, name="mine", weights=replace(Q4_0.weights, scale_format=FLOAT32)), "use q4_0"),
    "blocks of 64": (
        replace(Q4_0, name="mine", weights=replace(Q4_0.weights, granularity=per_group(64))), "use q4_0"),
    "three bits": (
        replace(Q4_0, name="mine", weights=replace(Q4_0.weights, format=IntFormat(3))), "weights; use q4_0"),
    "a zero point": (
        replace(Q4_1, name="mine", weights=replace(Q4_1.weights, scale_rule="affine")), "weights; use q4_1"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "message"), SCHEMES.values(), ids=SCHEMES)
def test_a_lattice_that_no_type_holds_is_refused(scheme: Scheme | str, message: str) -> None:
    name = scheme if isinstance(scheme, str) else scheme.name
    refused(
        small(hidden_size=128), scheme, rf"^model\.layers\.0\.self_attn\.q_proj: scheme '{name}'.*{message}"
    )


RULES = {"q8_0": "half-range", "q4_0": "narrow", "mxfp4-gguf": "rceil"}


@pytest.mark.parametrize(("name", "rule"), RULES.items(), ids=RULES)
def test_any_rule_that_finds_such_scales_is_written(name: str, rule: Any) -> None:
    """A block holds any scale; how it was found is nobody's business."""
    weights = replace(PRESETS[name].weights, scale_rule=rule, ranges="static")
    model = small("qwen2")
    preflight(model, resolve(model, replace(PRESETS[name], name="mine", weights=weights)), "gguf")


def test_an_embedding_with_another_lattice_is_refused() -> None:
    rules = [{"match": "model.embed_tokens", "scheme": "w8a16"}]
    refused(small(), {"scheme": "q8_0", "rules": rules}, "embed_tokens: scheme 'w8a16': no type .* use q8_0")


def test_columns_that_a_block_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="64 columns cannot be cut into groups of 256"):
        resolve(small("qwen2"), "tq2_0")
    with pytest.raises(ValueError, match="48 columns cannot be cut into groups of 32"):
        resolve(small("qwen2", intermediate_size=48), "q8_0")


SIZES = {"vocab_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no language model": (
        lambda: nn.Sequential(nn.Linear(32, 4)),
        "no llama.cpp architecture for Sequential; there are LlamaForCausalLM, MistralForCausalLM, .*Gemma3"),
    "a head of its own": (
        lambda: LlamaForSequenceClassification(LlamaConfig(hidden_size=32, intermediate_size=32, **SIZES)),
        "no llama.cpp architecture for LlamaForSequenceClassification"),
    "experts": (
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
            hidden_size=32, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
            **SIZES)),
        "no llama.cpp architecture for Qwen3MoeForCausalLM"),
    "activation": (
        lambda: small("llama", hidden_act="relu"),
        "activation is relu, llama.cpp computes llama with silu; export to onnx or compressed-tensors"),
    "rotation": (
        lambda: small("qwen2", rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}),
        "rope_type is 'dynamic', which is not written for qwen2; there are default, linear"),
    "llama 3's rotation elsewhere": (
        lambda: small("qwen3", rope_parameters=dict(small("llama 3").config.rope_parameters)),
        "rope_type is 'llama3', which is not written for qwen3"),
    "half a rotation": (
        lambda: small("llama", rope_parameters={
            "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor is 0.5, llama.cpp's llama rotates whole heads"),
    "windows": (
        lambda: small("gemma2", layer_types=["full_attention", "full_attention"]),
        r"layer_types is \['full_attention', 'full_attention'\], llama.cpp computes gemma2 with \['sliding_"),
    "attention": (
        lambda: small("gemma3", query_pre_attn_scalar=64),
        "query_pre_attn_scalar is 64, .* gemma3 with 32"),
    "capped logits": (
        lambda: small("gemma3", final_logit_softcapping=30.0),
        "final_logit_softcapping is 30.0, .* with None"),
    "layers without rotation": (
        lambda: small("smollm3", no_rope_layers=[1, 0, 1, 0]),
        r"no_rope_layers is \[1, 0, 1, 0\], .* \[1, 1, 1, 0\]"),
    "biases": (
        lambda: small("qwen3", attention_bias=True), "llama.cpp's qwen3 has no place for .*q_proj.bias"),
    "untied": (
        lambda: small("gemma", tie_word_embeddings=False),
        "lm_head is not tied to model.embed_tokens, llama.cpp's gemma has no output matrix of its own; bring "
        "it tied and without untie, or export to onnx or compressed-tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_llama_cpp_does_not_compute_is_refused(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    rules = [{"match": name, "scheme": "none"} for name in (*embeddings, "*.experts", "*.gate")]
    matched = [rule for rule in rules if rule["match"] in embeddings or "Moe" in type(model).__name__]
    refused(model, {"scheme": "q8_0", "rules": matched}, f"^gguf: {message}")


def test_gpt2_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=8))
    refused(model, "q8_0", "no llama.cpp architecture for GPT2LMHeadModel")


def test_refused_again_when_converted(tmp_path: Path) -> None:
    model = quantized("w4a16", small("qwen2"))
    with pytest.raises(ValueError, match=r"q_proj: scheme 'w4a16': no type of llama\.cpp holds"):
        export(model, tmp_path / "out", "gguf", example=batch())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["gguf", "transformers", "xllamacpp"])
def test_a_missing_library_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("qwen2")
    plan = resolve(model, "q8_0")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"the gguf target needs {library}: pip install 'recoup\[gguf\]'"):
        preflight(model, plan, "gguf")


@pytest.mark.parametrize("library", ["gguf", "xllamacpp"])
def test_running_a_file_without_the_library_names_the_extra(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recoup.export import TARGETS

    TARGETS["gguf"].write(small("qwen2"), tmp_path, batch())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ImportError, match=rf"running a GGUF file needs {library}: pip install 'recoup\[gguf\]'"
    ):
        TARGETS["gguf"].load(tmp_path)


def test_a_tables_scheme_has_no_inputs() -> None:
    assert isinstance(table("q4_1").weights, QuantSpec)
    model = small("llama tied")
    rules = [{"match": "model.embed_tokens", "scheme": table("q4_1")}, {"match": "lm_head", "scheme": "q4_1"}]
    preflight(model, resolve(model, Recipe.model_validate({"scheme": "q8_0", "rules": rules})), "gguf")
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
