"""Modules that share one Parameter share its numbers, from the quantizer to the codes, or stay in float."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from recoup import Plan, calibrate, convert, explain, param_groups, prepare, resolve
from recoup.nn import Codes, FakeQuantizer, call, quant_type, quantization_off
from recoup.schemes import PRESETS, Scheme
from tests.models import WORDS, Tied, every_scheme, ids, llama, recipe, run, same, tensors

# Where the embedding and the head are.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "tied": (Tied, "tokens", "lm_head"),
    "llama": (llama, "model.embed_tokens", "lm_head"),
}
every_tied_model = pytest.mark.parametrize(("build", "words", "head"), MODELS.values(), ids=MODELS)


def both(scheme: Scheme, words: str, head: str) -> list[tuple[str, Scheme]]:
    """Rules for a head with the scheme's inputs, and an embedding with the same weights."""
    if scheme.weights.granularity.rows not in (None, 1):
        scheme = PRESETS["w4a8"]  # 16 words are no tile of 128
    table = replace(scheme, name=f"{scheme.name}-words", inputs=None, integer_bias=False)
    return [(head, scheme), (words, table)]


def prepared(build: Callable[[], nn.Module], rules: list[tuple[str, Any]], **fields: Any) -> nn.Module:
    model = build().eval()
    prepare(model, resolve(model, recipe("w4a16", *rules, **fields)))
    return calibrate(model, [ids()])


@every_tied_model
@every_scheme
@pytest.mark.parametrize("ranges", [None, "learned"], ids=str)
def test_quantized_they_have_one_quantizer_and_then_one_set_of_codes(
    build: Callable[[], nn.Module], words: str, head: str, scheme: Scheme, ranges: str | None
) -> None:
    batch, model = ids(), build().eval()
    float_outputs = run(model, batch)
    weight = model.get_submodule(words).weight
    prepare(model, resolve(model, recipe("w4a16", *both(scheme, words, head), weight_ranges=ranges)))
    calibrate(model, [batch])
    embedding, linear = model.get_submodule(words), model.get_submodule(head)
    assert embedding.weight is linear.weight is weight
    assert embedding.weight_quantizer is linear.weight_quantizer
    with quantization_off(model):
        assert same(run(model, batch), float_outputs)

    sum(output.square().mean() for output in tensors(call(model, batch))).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    computed, trained = run(model, batch), embedding.weight_quantizer(weight).detach()
    convert(model)
    embedding, linear = model.get_submodule(words), model.get_submodule(head)
    assert isinstance(embedding.weight, Codes)
    assert embedding.weight is linear.weight
    assert torch.equal(embedding.weight.decode(), trained)
    assert same(run(model, batch), computed)


@every_tied_model
def test_a_checkpoint_loads_strictly_and_copies_stay_tied(
    build: Callable[[], nn.Module], words: str, head: str
) -> None:
    rules, batch = both(PRESETS["w4a8"], words, head), ids()
    model = prepared(build, rules, weight_ranges="learned")
    model.get_submodule(head).weight_quantizer.scale.data *= 1.1
    expected = run(model, batch)
    fresh = build().eval()
    prepare(fresh, resolve(fresh, recipe("w4a16", *rules, weight_ranges="learned")))
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(run(other, batch), expected)
        assert other.get_submodule(head).weight_quantizer is other.get_submodule(words).weight_quantizer
    converted = convert(copy.deepcopy(model))
    again = convert(fresh)
    again.load_state_dict(converted.state_dict(), strict=True)
    assert same(run(again, batch), expected)


@every_tied_model
def test_a_learned_scale_trains_once_with_the_gradients_of_both(
    build: Callable[[], nn.Module], words: str, head: str
) -> None:
    model = prepared(build, both(PRESETS["w4a16"], words, head), weight_ranges="learned")
    scale = model.get_submodule(head).weight_quantizer.scale
    assert sum(parameter is scale for parameter in model.parameters()) == 1
    groups = param_groups(model, lr=0.1)
    assert sum(parameter is scale for group in groups for parameter in group["params"]) == 1

    apart = torch.zeros_like(scale)
    for name in (words, head):  # each of the two with a quantizer of its own, at the same values
        untied = copy.deepcopy(model)
        untied.zero_grad()
        other = copy.deepcopy(untied.get_submodule(name).weight_quantizer)
        untied.get_submodule(name).weight_quantizer = other
        sum(output.square().mean() for output in tensors(call(untied, BATCH))).backward()
        apart += other.scale.grad
    sum(output.square().mean() for output in tensors(call(model, BATCH))).backward()
    torch.testing.assert_close(scale.grad, apart)
    assert scale.grad.count_nonzero() > 0


BATCH = {"input_ids": torch.arange(8).reshape(2, 4) % WORDS}


def test_explain_counts_them_once() -> None:
    model = Tied()
    plan = resolve(model, recipe("w4a16", ("tokens", "w4a16"), ("lm_head", "w4a8")))
    found = explain(model, plan)
    assert [row.parameter for row in found.rows if row.scheme != "float"] == ["tokens.weight", "block.weight"]
    assert found.bytes_before == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert plan.modules == {"tokens": "w4a16", "block": "w4a16", "lm_head": "w4a8"}
    assert "lm_head.weight" not in plan.kept


def test_one_rule_for_all_is_one_for_the_tied_too() -> None:
    plan = resolve(Tied(), recipe("w4a16", ("*", "w8a16")))
    assert set(plan.modules) == {"tokens", "positions", "block", "lm_head"}


def test_two_that_share_only_a_bias_are_not_tied() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].bias = model[0].bias
    plan = resolve(model, "w4a16")
    assert set(plan.modules) == {"0", "1"}
    assert plan.kept == {"0.bias": "bias", "1.bias": "bias"}


class Table(nn.Module):
    """Holds the weight of a Linear under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.table = self.layer.weight


def transposed_tie() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": Conv1D(32, 32)})
    model["b"].weight = model["a"].weight
    return model


KEEP = (
    ", write untie: true (recoup.transforms.untie) to give each its own, "
    "or keep both in float with scheme: none"
)
MISTAKES = {
    "the head alone": (
        Tied,
        [("lm_head", "w8a16")],
        "lm_head: its weight is tied to that of tokens, which stays in float; "
        "write {match: tokens, scheme: w8a16} to quantize both alike" + KEEP,
    ),
    "the head alone, with inputs": (
        Tied,
        [("lm_head", "w4a8")],
        "lm_head: its weight is tied to that of tokens, which stays in float; "
        "write {match: tokens, scheme: w4a16} to quantize both alike" + KEEP,
    ),
    "the head alone, with inputs and weights that no preset has alone": (
        Tied,
        [("lm_head", "w8a8")],
        "lm_head: its weight is tied to that of tokens, which stays in float; "
        "write {match: tokens, scheme: one with the weights of w8a8 and no inputs} to quantize both alike"
        + KEEP,
    ),
    "the embedding alone": (
        llama,
        [("model.embed_tokens", "w8a16")],
        "model.embed_tokens: its weight is tied to that of lm_head, which stays in float; "
        "write {match: lm_head, scheme: w8a16} to quantize both alike" + KEEP,
    ),
    "one of them kept by a rule": (
        Tied,
        [("lm_head", "none"), ("tokens", "w8a16")],
        "tokens: its weight is tied to that of lm_head, which stays in float; ",
    ),
    "two lattices": (
        Tied,
        [("lm_head", "w4a16"), ("tokens", "w8a16")],
        "tokens: its weight is tied to that of lm_head, but 'w8a16' and 'w4a16' have different weights; "
        "write {match: lm_head, scheme: w8a16} to quantize both alike" + KEEP,
    ),
    "a parameter of the model itself": (
        Table,
        [("layer", "w4a16")],
        "layer: its weight is tied to that of table, which stays in float; write untie: true (",
    ),
    "one that reads it transposed": (
        transposed_tie,
        [("*", "w4a16")],
        "a: its weight is tied to that of b, which reads it the other way round; write untie: true (",
    ),
}


@pytest.mark.parametrize(("build", "rules", "message"), MISTAKES.values(), ids=MISTAKES)
def test_half_of_a_tie_is_refused_and_the_advice_helps(
    build: Callable[[], nn.Module], rules: list[tuple[str, Any]], message: str
) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"\w") as error:
        resolve(model, recipe("w4a16", *rules))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    match, _, scheme = str(error.value).partition("{match: ")[2].partition("}")[0].partition(", scheme: ")
    if scheme in PRESETS:
        plan = resolve(model, recipe("w4a16", (match, scheme), *rules))
        assert match in plan.modules


def test_a_plan_by_hand_is_held_to_the_same() -> None:
    plan = resolve(Tied(), recipe("w4a16", ("tokens", "w4a16"), ("lm_head", "w4a8")))
    half = Plan(
        schemes=plan.schemes, modules={n: s for n, s in plan.modules.items() if n != "tokens"}, kept=plan.kept
    )
    model = Tied()
    with pytest.raises(
        ValueError, match=r"^lm_head: its weight is tied to that of tokens, which stays in float"
    ):
        prepare(model, half)
    assert not any(isinstance(module, FakeQuantizer) for module in model.modules())
    assert all(quant_type(module) for module in (model.tokens, model.lm_head))
