"""What a compressed-tensors folder cannot hold is refused; what NVFP4 needs beyond a module is settled."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from recoup import Recipe, Scheme, export, resolve
from recoup.export import preflight, share_global_scales
from recoup.nn import FakeQuantizer, QuantLinear
from recoup.numerics import IntFormat, QuantSpec
from recoup.schemes import PRESETS

from .llamas import (
    WORDS,
    Processor,
    calibrated,
    llama,
)

# What NVFP4 needs beyond a module


def fused_scales(model: nn.Module, *names: str) -> list[float]:
    found: list[float] = []
    for name in names:
        module = model.get_submodule(f"model.layers.0.{name}")
        assert isinstance(module, QuantLinear)
        assert module.weight_quantizer.global_scale is not None
        found.append(float(module.weight_quantizer.global_scale))
    return found


def test_fused_siblings_share_the_largest_global_scale() -> None:
    torch.manual_seed(0)
    model = calibrated("nvfp4")
    siblings = [f"self_attn.{name}_proj" for name in "qkv"]
    before = copy.deepcopy(model)
    own = fused_scales(model, *siblings)
    alone = fused_scales(model, "self_attn.o_proj", "mlp.down_proj")
    assert len(set(own)) == 3
    assert share_global_scales(model) is model
    assert set(fused_scales(model, *siblings)) == {max(own)}
    assert len(set(fused_scales(model, "mlp.gate_proj", "mlp.up_proj"))) == 1
    assert fused_scales(model, "self_attn.o_proj", "mlp.down_proj") == alone
    for name in siblings:
        old, new = (m.get_submodule(f"model.layers.0.{name}.weight_quantizer") for m in (before, model))
        assert isinstance(old, FakeQuantizer)
        assert isinstance(new, FakeQuantizer)
        steps = new.stored_qparams.step / old.stored_qparams.step
        assert ((steps - 1).abs() <= 2**-4).all()  # half a step of E4M3, relative
    once = [t.clone() for t in model.state_dict().values()]
    assert all(map(torch.equal, once, share_global_scales(model).state_dict().values()))


def test_global_scales_that_differ_are_refused(tmp_path: Path) -> None:
    model = calibrated("nvfp4a16")
    message = (
        r"q_proj, .*k_proj, .*v_proj: .* call recoup.export.share_global_scales\(model\) after calibrate"
    )
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_fused_siblings_with_a_scale_per_tensor_share_the_largest(tmp_path: Path) -> None:
    model = calibrated("fp8-static")
    with pytest.raises(ValueError, match=r"q_proj, .*one scale for the whole tensor, and theirs differ"):
        export(model, tmp_path / "out", "compressed-tensors", processor=Processor())
    share_global_scales(model)
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    scales = [float(getattr(attention, f"{name}_proj").weight_quantizer.scale) for name in "qkv"]
    assert len(set(scales)) == 1
    largest = max(float(getattr(attention, f"{name}_proj").weight.detach().abs().max()) for name in "qkv")
    assert scales[0] == pytest.approx(largest / 448, rel=1e-6)
    export(model, tmp_path / "out", "compressed-tensors", processor=Processor())


# What is refused, before any work


def test_learned_scales_of_whole_tensors_are_refused() -> None:
    message = r"q_proj, .*learned ones would differ; use static ranges, or a scale per channel"
    refused(llama(), {"scheme": "fp8-static", "weight_ranges": "learned"}, message)


def test_experts_that_stay_in_float_are_refused() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = Qwen3MoeConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        **sizes,
    )
    rules = [{"match": "*.mlp", "scheme": "none"}]
    message = r"experts\.\w+ is a stack of experts that stays in float"
    refused(Qwen3MoeForCausalLM(config), {"scheme": "w4a16", "rules": rules}, message)


def refused(model: nn.Module, recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        preflight(model, resolve(model, Recipe.model_validate(recipe)), "compressed-tensors")
    assert "\n" not in str(error.value)


REFUSED: dict[str, tuple[Scheme | str, str]] = {
    "mxfp6": ("mxfp6", "e2m3 per g32, static .* have no place there; w2a16 to w8a16"),
    "w8a8-ort": ("w8a8-ort", r"uint8 per tensor, dynamic \(affine\) inputs have no place there; w2a16 to"),
    "w8a8-ort-static": ("w8a8-ort-static", r"uint8 per tensor, static \(affine\) inputs have no place there"),
    "w4a8-ort": ("w4a8-ort", "negative scales have no kernel in vLLM; use half-range or narrow"),
    "affine": (
        Scheme(name="affine", weights=replace(PRESETS["w4a16"].weights, scale_rule="affine")),
        r"int4 per g32, static \(affine\) weights with float inputs have no place there; zero points"),
    "unsigned": (
        Scheme(name="unsigned", weights=replace(PRESETS["w4a16"].weights, scale_rule="affine",
                                                format=IntFormat(4, signed=False))), "uint4 per g32"),
    "another dynamic rule": (
        replace(PRESETS["w4a8"], name="mine",
                inputs=replace(cast(QuantSpec, PRESETS["w4a8"].inputs), scale_rule="half-range")),
        r"int8 per row, dynamic \(half-range\) inputs have no place there"),
    "inputs per group": (
        replace(PRESETS["w4a8"], name="mine", inputs=PRESETS["w4a8-ort"].inputs),
        r"int8 per g32, dynamic \(narrow\) inputs"),
    "fp8 without inputs": (Scheme(name="w8a16-fp8", weights=PRESETS["fp8"].weights), "with float inputs"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_format_cannot_say_is_refused(scheme: Scheme | str, message: str) -> None:
    refused(
        llama(),
        {"scheme": scheme},
        f"q_proj: scheme .* cannot be written for compressed-tensors: .*{message}",
    )


def test_embeddings_are_refused() -> None:
    rules = [{"match": "model.embed_tokens", "scheme": "w8a16"}]
    message = (
        r"embed_tokens: compressed-tensors folders hold quantized Linears, not Embeddings; keep it "
        r"with \{match: model.embed_tokens, scheme: none\}, or export to onnx"
    )
    refused(llama(), {"scheme": "w4a16", "rules": rules}, message)


def test_siblings_with_two_schemes_are_refused() -> None:
    rules = [{"match": "*.v_proj", "scheme": "none"}]
    message = r"q_proj, .*v_proj: vLLM runs them as one product, and they have the schemes none, w4a16; give"
    refused(llama(), {"scheme": "w4a16", "rules": rules}, message)


def test_gpt2s_transposed_layers_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=1, n_head=2, n_positions=8))
    refused(model, {"scheme": "w8a8"}, "hold quantized Linears, not Conv1Ds; keep it")


class Unknown(LlamaForCausalLM):
    pass


def test_models_that_nobody_could_load_are_refused(tmp_path: Path) -> None:
    refused(nn.Sequential(nn.Linear(32, 4)), {"scheme": "w4a16"}, "the model is a torch.nn.modules.container")
    model = llama()
    unknown = Unknown(model.config)
    refused(unknown, {"scheme": "w4a16"}, "transformers does not know the class Unknown")
    cast(Any, model).hf_quantizer = object()
    refused(model, {"scheme": "w4a16"}, "loaded this model from quantized weights")
