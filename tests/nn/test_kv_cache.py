"""Keys and values are fake-quantized as an engine's cache holds them; nothing else of attention changes."""

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from recoup import Plan, Recipe, calibrate, convert, explain, param_groups, prepare, resolve, train
from recoup.nn import FakeQuantizer, cache_quantizers, quantization_off
from recoup.numerics import Ranges
from recoup.schemes.presets import KV_PRESETS
from recoup.schemes.training import TrainSettings
from recoup.train.activations import activations_recomputed

WORDS = 16
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD: dict[str, Any] = {"head_dim": 16}
SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3, norms before the rotation": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEAD)),
    "gemma3, a sliding window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEAD, **SLIDING)),
    "phi3, one projection": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}
FUNCTIONS = ("sdpa", "eager")
PAIRS = [(f"{name}, {function}", name, function) for name in MODELS for function in FUNCTIONS]
every_model = pytest.mark.parametrize(
    ("build", "function"), [pytest.param(MODELS[name], function, id=label) for label, name, function in PAIRS]
)
RECIPE = Recipe.model_validate(
    {"scheme": "w8a16", "kv": "fp8", "rules": [{"match": "*.embed_tokens", "scheme": "none"}]}
)


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (2, 8))}


def built(build: Callable[[], PreTrainedModel] = MODELS["llama"], function: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = build().eval()
    model.set_attn_implementation(function)
    return model


def prepared(
    build: Callable[[], PreTrainedModel] = MODELS["llama"], function: str = "sdpa", recipe: Recipe = RECIPE
) -> PreTrainedModel:
    model = built(build, function)
    return calibrate(prepare(model, resolve(model, recipe)), [batch()])  # pyright: ignore[reportReturnType]


def only_the_cache(model: nn.Module) -> None:
    """Switch every other quantizer off."""
    caches = {quantizer for pair in cache_quantizers(model).values() for quantizer in pair}
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = module in caches


class CodedCache(DynamicCache):
    """An engine's cache, written independently: codes are decided when a key is written, by torch's cast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(config=getattr(model, "config"))  # noqa: B009 (a Module has none for pyright)
        self.scales = [(key.scale, value.scale) for key, value in cache_quantizers(model).values()]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        held = []
        for x, scale in zip((key_states, value_states), self.scales[layer_idx], strict=True):
            assert scale is not None
            code = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            held.append(code.float() * scale)
        return super().update(*held, layer_idx, *args, **kwargs)


@every_model
def test_without_quantization_it_is_the_float_model_to_the_bit(
    build: Callable[[], PreTrainedModel], function: str
) -> None:
    model, example = built(build, function), batch()
    expected = model(**example).logits
    calibrate(prepare(model, resolve(model, RECIPE)), [example])
    assert not torch.equal(model(**example).logits, expected)
    with quantization_off(model):
        assert torch.equal(model(**example).logits, expected)


@every_model
def test_it_is_the_float_model_with_a_cache_of_codes(
    build: Callable[[], PreTrainedModel], function: str
) -> None:
    model, example = prepared(build, function), batch()
    only_the_cache(model)
    found = model(**example).logits
    with quantization_off(model):
        expected = model(**example, past_key_values=CodedCache(model)).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_words_one_by_one_are_those_of_a_cache_of_codes(build: Callable[[], PreTrainedModel]) -> None:
    model, example = prepared(build), batch()
    only_the_cache(model)
    generate = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = model.generate(**example, **generate)
    with quantization_off(model):
        expected = model.generate(**example, **generate, past_key_values=CodedCache(model))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


def test_scales_are_those_of_rotated_keys_and_of_values_as_bfloat16() -> None:
    model, example = built(), batch()
    cache = DynamicCache(config=model.config)
    model(**example, past_key_values=cache)
    calibrate(prepare(model, resolve(model, RECIPE)), [example])
    assert list(cache_quantizers(model)) == [f"model.layers.{index}.self_attn" for index in range(2)]
    for layer, (key, value) in zip(cache.layers, cache_quantizers(model).values(), strict=True):
        for quantizer, seen in ((key, layer.keys), (value, layer.values)):
            assert seen is not None
            assert quantizer.scale is not None
            expected = (seen.abs().amax() / 448).to(torch.bfloat16).float()
            assert torch.equal(quantizer.scale, expected.reshape(1, 1))


def test_gradients_pass_straight_through_and_stop_where_keys_saturate() -> None:
    model, example = prepared(), batch()
    key, _ = cache_quantizers(model)["model.layers.0.self_attn"]
    assert key.scale is not None
    key.scale.mul_(0.5)  # some keys saturate
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for name, tensor in (("in", inputs[0]), ("out", output)):
            tensor.retain_grad()
            seen[name] = tensor

    with_hook = key.register_forward_hook(keep)
    model(**example, labels=example["input_ids"]).loss.backward()
    with_hook.remove()
    inside = seen["in"].abs() <= 464 * key.scale  # what rounds to 448, the tie with 480 among it
    assert 0 < inside.float().mean() < 1
    before, after = seen["in"].grad, seen["out"].grad
    assert before is not None
    assert after is not None
    assert torch.equal(before, torch.where(inside, after, 0))


def test_it_resumes_by_its_plan_and_its_state() -> None:
    model, example = prepared(), batch()
    plan = resolve(built(), RECIPE)
    fresh = prepare(built(), Plan.from_json(plan.to_json()))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(**example).logits, model(**example).logits)
    assert {
        "model.layers.0.self_attn.key_quantizer.scale",
        "model.layers.1.self_attn.value_quantizer.scale",
    } <= set(model.state_dict())


def test_converting_changes_no_bit() -> None:
    model, example = prepared(), batch()
    expected = model(**example).logits
    assert torch.equal(convert(copy.deepcopy(model))(**example).logits, expected)


ONE_GRAPH = """
import torch
from tests.nn.test_kv_cache import batch, prepared

for function in ("sdpa", "eager"):
    model, example = prepared(function=function), batch()
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**example).logits, model(**example).logits)
print("same")
"""


def test_it_is_one_graph_for_torch_compile() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("same\n"), done.stderr[-3000:]


def test_activations_that_are_computed_again_are_the_same() -> None:
    gradients: list[list[Tensor | None]] = []
    for again in (False, True):
        model = prepared().train()
        torch.manual_seed(2)
        example = batch()
        with activations_recomputed(model) if again else nullcontext():
            model(**example, labels=example["input_ids"], use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert torch.equal(plain, checkpointed)


def test_a_model_of_the_same_config_is_left_alone() -> None:
    model, example = built(), batch()
    other = LlamaForCausalLM(model.config).eval()
    expected = other(**example).logits
    calibrate(prepare(model, resolve(model, RECIPE)), [example])
    assert torch.equal(other(**example).logits, expected)
    calibrate(prepare(other, resolve(other, RECIPE)), [example])  # by the function that is registered already
    with quantization_off(other):
        assert torch.equal(other(**example).logits, expected)


@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_it_is_trained_under(ranges: Ranges) -> None:
    recipe = Recipe(scheme=RECIPE.scheme, kv=replace(KV_PRESETS["fp8"], ranges=ranges))
    model = prepared(recipe=recipe)
    attention: Any = model.model.layers[0].self_attn
    weight, scale = attention.k_proj.weight.clone(), attention.key_quantizer.scale.clone()
    learned = {id(p) for group in param_groups(model, 1e-3) for p in group["params"]}
    key, value = cache_quantizers(model)["model.layers.0.self_attn"]
    assert all((id(quantizer.scale) in learned) == (ranges == "learned") for quantizer in (key, value))
    batches = [batch() for _ in range(4)]
    train(model, batches, settings=TrainSettings(steps=4, learning_rate=1e-3, evaluate_every=4))
    assert not torch.equal(attention.k_proj.weight, weight)
    assert torch.equal(attention.key_quantizer.scale, scale) == (ranges == "static")


def test_the_dry_run_shows_it() -> None:
    model = built()
    said = str(explain(model, resolve(model, RECIPE))).splitlines()[-1]
    assert said == "KV cache of 2 attention layers: e4m3 per tensor, static"


BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no transformers model": (
        lambda: nn.Sequential(nn.Linear(32, 32)),
        r"^kv: a Sequential is no transformers model that generates"),
    "an encoder": (
        lambda: BertModel(BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32)),
        r"^kv: a BertModel is no transformers model that generates"),
    "attention to another sequence": (
        lambda: T5ForConditionalGeneration(T5Config(
            vocab_size=WORDS, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)),
        r"^kv: T5ForConditionalGeneration has no attention whose keys and values are those of its own past"),
    "no projection of keys": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=32, n_layer=1, n_head=2)),
        r"^transformer\.h\.0\.attn: a GPT2Attention has no k_proj and v_proj, nor qkv_proj"),
    "another layout": (
        lambda: built(function="flex_attention"),
        r"self_attn: attention is computed by 'flex_attention', .* load the model with attn_implementation="),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_such_cache_is_refused_in_one_line(case: str) -> None:
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        resolve(build(), Recipe.model_validate({"scheme": "w8a16", "kv": "fp8"}))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = resolve(built(), RECIPE)
    shorter = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))
    one = Plan(schemes=plan.schemes, modules={}, kv=plan.kv, caches=plan.caches)
    with pytest.raises(
        ValueError, match=r"keys and values of 'model\.layers\.1\.self_attn', which keeps none"
    ):
        prepare(shorter, one)
