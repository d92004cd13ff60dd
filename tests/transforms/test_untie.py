"""Untied weights compute the same, and nothing ties them again: no loading, no resizing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from recoup import explain, prepare, resolve
from recoup.nn import shared_parameters
from recoup.transforms import untie
from tests.models import MLP, WORDS, Shared, Tied, gpt2, llama, recipe, run, same

_SMALL = LlamaConfig(
    vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
)  # fmt: skip


def bart() -> nn.Module:
    config = BartConfig(
        vocab_size=WORDS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


def llava() -> nn.Module:
    eyes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = copy.deepcopy(_SMALL)
    config = LlavaConfig(text_config=text, vision_config=eyes, image_token_index=1, tie_word_embeddings=True)
    return LlavaForConditionalGeneration(config)


# What is tied to what.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "tied": (Tied, {"lm_head.weight": "tokens.weight"}),
    "llama": (llama, {"lm_head.weight": "model.embed_tokens.weight"}),
    "gpt2": (gpt2, {"lm_head.weight": "transformer.wte.weight"}),
    "bart": (
        bart,
        dict.fromkeys(
            ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
            "model.shared.weight",
        ),
    ),
    "llava": (llava, {"lm_head.weight": "model.language_model.embed_tokens.weight"}),
}
every_tied_model = pytest.mark.parametrize(("build", "pairs"), MODELS.values(), ids=MODELS)
of_transformers = pytest.mark.parametrize(
    "build", [llama, gpt2, bart, llava], ids=["llama", "gpt2", "bart", "llava"]
)


def example(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 6).reshape(1, 4)
    decoder = {"decoder_input_ids": ids} if isinstance(model, BartForConditionalGeneration) else {}
    return {"input_ids": ids, **decoder}


@every_tied_model
def test_every_module_gets_its_own_and_the_function_stays(
    build: Callable[[], nn.Module], pairs: dict[str, str]
) -> None:
    model = build().eval()
    before, batch = dict(model.named_parameters(remove_duplicate=False)), example(model)
    expected = run(model, batch)
    assert untie(model) is model
    after = dict(model.named_parameters())
    assert model.recoup_untied == pairs
    assert list(dict(model.named_parameters(remove_duplicate=False))) == list(before) == list(after)
    assert {name for name, own in after.items() if own is not before[name]} == set(pairs)
    assert all(torch.equal(own, before[name]) for name, own in after.items())
    assert not shared_parameters(model)
    assert same(run(model, batch), expected)


def test_what_is_frozen_stays_frozen() -> None:
    model = Tied()
    model.tokens.weight.requires_grad_(False)
    assert not untie(model).lm_head.weight.requires_grad


@of_transformers
def test_a_saved_model_loads_with_both(build: Callable[[], Any], tmp_path: Path) -> None:
    model: Any = untie(build().eval())
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        head.weight += 1
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict())  # under names of files
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, head.weight)
    assert torch.equal(loaded.get_input_embeddings().weight, table.weight)
    assert not shared_parameters(loaded)
    assert same(run(loaded.eval(), example(model)), run(model, example(model)))


@of_transformers
def test_neither_tying_nor_resizing_brings_it_back(build: Callable[[], Any]) -> None:
    model: Any = untie(build())
    model.tie_weights()
    model.tie_weights(recompute_mapping=False)
    model.resize_token_embeddings(WORDS + 8)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert len(head) == len(table) == WORDS + 8
    assert head is not table
    assert not shared_parameters(model)


def test_rules_may_differ_then_and_explain_tells_the_cost() -> None:
    rules = (("lm_head", "w4a8"), ("tokens", "w8a16"))
    model = untie(Tied())
    plan = resolve(model, recipe("w4a16", *rules, untie=True))
    assert (plan.modules["lm_head"], plan.modules["tokens"]) == ("w4a8", "w8a16")
    twin = prepare(copy.deepcopy(model), plan)
    assert twin.lm_head.weight_quantizer is not twin.tokens.weight_quantizer
    found = explain(model, plan)
    row = next(row for row in found.rows if row.parameter == "lm_head.weight")
    assert found.cost_of_untying == (row.bytes_before, row.bytes_after) == (16 * 256 * 4, row.bytes_after)
    assert str(found).endswith(
        "untied: lm_head.weight from tokens.weight; "
        f"takes 16,384 bytes more before and {row.bytes_after:,} after"
    )
    assert "untied" not in str(explain(MLP(), resolve(MLP(), "w4a16")))


def test_one_of_them_may_stay_in_float() -> None:
    plan = resolve(untie(Tied()), recipe("w4a16", ("lm_head", "w8a16")))
    assert plan.modules["lm_head"] == "w8a16"
    assert plan.kept["tokens.weight"] == "embedding, kept unless a rule names it"


class AlwaysTied(LlamaForCausalLM):
    """Ties in code, and asks no config."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.lm_head.weight = self.model.embed_tokens.weight


def umt5() -> PreTrainedModel:
    return UMT5ForConditionalGeneration(
        UMT5Config(vocab_size=WORDS, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


IN_SPITE = {
    "in code": (lambda: AlwaysTied(_SMALL), "AlwaysTied", "is tied whatever tie_word_embeddings says"),
    "in the config": (t5, "T5ForConditionalGeneration", "is tied whatever tie_word_embeddings says"),
    "asked by forward": (
        umt5,
        "UMT5ForConditionalGeneration",
        "computes something else where tie_word_embeddings is False",
    ),
}


@pytest.mark.parametrize(("build", "name", "why"), IN_SPITE.values(), ids=IN_SPITE)
def test_what_cannot_be_untied_is_refused_and_left_as_it_was(
    build: Callable[[], Any], name: str, why: str
) -> None:
    model = build()
    before, keys = dict(model.named_parameters(remove_duplicate=False)), dict(model.all_tied_weights_keys)
    first, other, *_ = shared_parameters(model)[0]
    with pytest.raises(ValueError, match=r"^untie: ") as error:
        untie(model)
    assert str(error.value) == (
        f"untie: {name} {why}; leave untie out, and give {first} and {other} one scheme, or none"
    )
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameter is before[path] for path, parameter in after.items())
    assert model.config.tie_word_embeddings
    assert model.all_tied_weights_keys == keys
    assert not hasattr(model, "recoup_untied")


@pytest.mark.parametrize("build", [MLP, Shared], ids=["nothing shared", "one module at two places"])
def test_a_model_with_nothing_tied_is_refused(build: Callable[[], nn.Module]) -> None:
    message = "^untie: no two modules share a Parameter, nothing is tied; leave untie out$"
    with pytest.raises(ValueError, match=message):
        untie(build())


def test_a_prepared_model_is_refused() -> None:
    model = Tied()
    prepare(model, resolve(model, "w4a16"))
    message = "^untie: the model is prepared already; untie the float model, before resolve$"
    with pytest.raises(ValueError, match=message):
        untie(model)


def test_a_recipe_that_asks_is_not_resolved_for_a_model_that_is_tied() -> None:
    with pytest.raises(ValueError, match=r"^untie: asked") as error:
        resolve(Tied(), recipe("w4a16", untie=True))
    assert str(error.value) == (
        "untie: asked, and lm_head.weight is still tied to tokens.weight; "
        "call recoup.transforms.untie(model) first"
    )
