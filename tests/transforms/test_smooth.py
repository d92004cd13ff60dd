"""Channels are balanced wherever that changes no bit of what the model returns, and nowhere else."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recoup import Recipe, Rule, calibrate, prepare, ptq, resolve
from recoup.nn import Batch
from recoup.transforms import smooth
from tests.models import MLP, WIDTH, WORDS, bert, features, gpt2, ids, run

SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Two(nn.Module):
    """Two linear layers, and what is between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, read: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between, self.read = between, read

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(x))
        return self.second(y) + y if self.read else self.second(y)


class Twice(nn.Module):
    """One block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.layer(self.norm(x))
        return x


@dataclass(frozen=True, kw_only=True)
class Row:
    """A float model, its batch, and the Parameters that balancing changes, in the order of `state_dict`."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    changed: tuple[str, ...] = ()


def blocks(*names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{block}.{name}.weight" for block in range(2) for name in names)


_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA = blocks(*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *_NORMS)
_BERT = "encoder.layer.0.attention"
ROWS = {
    "llama, values for four queries": Row(
        build=lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        batch=ids,
        changed=_LLAMA,
    ),
    "qwen3, norms of queries and keys": Row(
        build=lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)), batch=ids, changed=_LLAMA
    ),
    "phi3, queries, keys and values in one matrix, gates in one": Row(
        build=lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
        batch=ids,
        changed=blocks(
            "self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS
        ),
    ),
    "gpt2, transposed layers": Row(
        build=gpt2,
        batch=ids,
        changed=tuple(
            f"transformer.h.0.{name}"
            for name in (
                *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"),
                *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight"),
            )
        ),
    ),
    "bert, whose norms a sum reads, too": Row(
        build=bert,
        batch=ids,
        changed=(f"{_BERT}.self.value.weight", f"{_BERT}.self.value.bias", f"{_BERT}.output.dense.weight"),
    ),
    "a head in float": Row(build=MLP, batch=features, changed=("norm.weight", "norm.bias", "down.weight")),
    "relu": Row(
        build=lambda: Two(torch.relu), batch=features, changed=("first.weight", "first.bias", "second.weight")
    ),
    "relu6": Row(build=lambda: Two(nn.functional.relu6), batch=features),
    "gelu": Row(build=lambda: Two(nn.functional.gelu), batch=features),
    "one more reads it": Row(build=lambda: Two(torch.relu, read=True), batch=features),
    "twice": Row(build=Twice, batch=features, changed=("norm.weight", "layer.weight")),
}  # fmt: skip
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def uneven(row: Row) -> nn.Module:
    """With norms, values and biases of many sizes, as large models have them."""
    torch.manual_seed(0)
    model = row.build().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.randn_like(parameter) * torch.randn_like(parameter).mul(2).exp()
    return model


def changes(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_of_the_outputs_changes(row: Row, dtype: torch.dtype) -> None:
    model = uneven(row).to(dtype).train()
    batch: Any = row.batch()
    batch = batch.to(dtype) if isinstance(batch, Tensor) else batch
    state, y = copied(model), run(model.eval(), batch)
    smooth(model, resolve(model, "w4a16"), [batch])
    assert all(map(torch.equal, run(model, batch), y))
    assert changes(state, model) == set(row.changed)


@every_row
def test_factors_are_powers_of_two_and_leave_less_to_balance(row: Row) -> None:
    model, batch = uneven(row), row.batch()
    moved: list[float] = []
    for _ in range(2):
        state = copied(model)
        smooth(model, resolve(model, "w4a16"), [batch])
        factors = [(model.state_dict()[name] / state[name]).nan_to_num(1) for name in row.changed]
        assert all(bool((factor.frexp().mantissa == 0.5).all()) for factor in factors)
        moved.append(sum(float(factor.log2().abs().sum()) for factor in factors))
    assert moved == [0, 0] if not row.changed else moved[1] < moved[0] / 3


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "mxfp4", "nvfp4"])
def test_rounding_costs_less_where_channels_are_large(scheme: str) -> None:
    torch.manual_seed(0)
    layer, errors = nn.Linear(WIDTH, WIDTH), list[float]()
    factors, x = torch.ones(WIDTH), features(32)
    factors[::32] = 64
    layer.weight.data[:, ::32] /= 16
    for balances in (False, True):
        model = nn.Sequential(nn.LayerNorm(WIDTH), copy.deepcopy(layer)).eval()
        model[0].weight.data.mul_(factors)
        y = run(model, x)[0]
        ptq(model, Recipe(scheme=scheme, smooth=balances), [x])
        errors.append(float((run(model, x)[0] - y).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_modules_keep_their_modes_and_hooks_go() -> None:
    model = uneven(ROWS["relu"]).train()
    smooth(model, resolve(model, "w4a16"), [features()])
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_what_the_plan_leaves_in_float_is_not_balanced() -> None:
    model = uneven(ROWS["llama, values for four queries"])
    recipe = Recipe(
        scheme="w4a16", rules=(Rule(match="*.mlp", scheme=None), Rule(match="*.o_proj", scheme=None))
    )
    state = copied(model)
    smooth(model, resolve(model, recipe), [ids()])
    assert changes(state, model) == set(
        blocks("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "input_layernorm")
    )


def test_channels_that_are_always_zero_stay_as_they_are() -> None:
    model, x = uneven(ROWS["relu"]), features(8)
    with torch.no_grad():
        model.first.weight[3], model.first.bias[3] = 0, -1  # never above 0
        model.second.weight[:, 5] = 0
    state = copied(model)
    smooth(model, resolve(model, "w4a16"), [x])
    for channel in (3, 5):
        assert torch.equal(model.first.weight[channel], state["first.weight"][channel])
        assert torch.equal(model.second.weight[:, channel], state["second.weight"][:, channel])


def test_sizes_are_those_of_all_samples() -> None:
    one, both = uneven(ROWS["relu"]), uneven(ROWS["relu"])
    x, large = features(4), 100 * features(4)
    smooth(one, resolve(one, "w4a16"), [x, large], samples=4)
    smooth(both, resolve(both, "w4a16"), [x, large], samples=8)
    assert changes(copied(one), both)


def test_what_stays_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = uneven(ROWS["gelu"])
    with caplog.at_level(logging.INFO, logger="recoup"):
        smooth(model, resolve(model, "w4a16"), [features()])
    assert "smooth: the input of second stays as it is: something else reads or bends it" in caplog.text


def test_a_recipe_asks_for_it() -> None:
    row = ROWS["llama, values for four queries"]
    plain, asked, batch = uneven(row), uneven(row), row.batch()
    smooth(plain, plan := resolve(plain, "w4a8"), [batch])
    calibrate(prepare(plain, plan), [batch], observer="mse")
    ptq(asked, Recipe(scheme="w4a8", smooth=True), iter([batch]))
    assert not changes(copied(plain), asked)


def test_refusals() -> None:
    model = uneven(ROWS["relu"])
    plan = resolve(model, "w4a16")
    with pytest.raises(ValueError, match=r"^smooth: 5 samples asked, 2 found; bring more, or ask for fewer$"):
        smooth(model, plan, [features()], samples=5)
    with pytest.raises(ValueError, match=r"^smooth: 1 samples asked, 0 found; bring more, or ask for fewer$"):
        smooth(model, plan, [])
    with pytest.raises(
        ValueError,
        match=r"^first.weight: float16 has too few exponents for factors of channels; "
        r"call model.float\(\) first$",
    ):
        smooth(model.half(), plan, [features()])
    prepare(model.float(), plan)
    with pytest.raises(ValueError, match=r"^smooth: the model is prepared already; balance the float model"):
        smooth(model, plan, [features()])
