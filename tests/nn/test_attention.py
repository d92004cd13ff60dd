"""nn.MultiheadAttention: its twin is torch's module in float, and four quantized Linears around attention."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import calibrate, convert, explain, prepare, resolve
from recoup.export import TARGETS, preflight
from recoup.nn import QuantMultiheadAttention, quantization_off
from recoup.validate.layers import layer_errors
from tests.models import recipe

WIDTH, HEADS, BATCH, QUERIES, KEYS = 64, 4, 2, 5, 7
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "batch first": {"batch_first": True},
    "no biases": {"bias": False},
    "widths of its own": {"kdim": 32, "vdim": 96, "batch_first": True},
    "a bias and a zero more": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS: dict[str, Any] = {
    "none": dict,
    "of places": lambda: {"attn_mask": torch.ones(QUERIES, KEYS).triu(2).bool()},
    "for each head": lambda: {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS)},
    "of keys": lambda: {"key_padding_mask": torch.arange(KEYS).expand(BATCH, -1) > 4},
    "both": lambda: {
        "attn_mask": torch.randn(QUERIES, KEYS), "key_padding_mask": torch.randn(BATCH, KEYS)
    },
    "a causal one, said to be": lambda: {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(KEYS)[:QUERIES], "is_causal": True
    },
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    """Attention alone, with its three inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention: Any = nn.MultiheadAttention(WIDTH, HEADS, **KINDS[kind])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


class Linears(nn.Module):
    """The oracle: four Linears, and attention as torch's function computes it."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        packed = attention.in_proj_weight is not None
        weights = attention.in_proj_weight.chunk(3) if packed else [
            attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        ]  # fmt: skip
        biases = attention.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            setattr(self, name, nn.Linear(*weight.T.shape))
            getattr(self, name).load_state_dict({"weight": weight, "bias": bias})
        self.o = nn.Linear(WIDTH, WIDTH)
        self.o.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (self.q(query), self.k(key), self.v(value))
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def inputs(kind: str, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys and values as this kind takes them."""
    options = KINDS[kind]
    widths = WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    made = [
        torch.randn(BATCH, places, width) for places, width in zip((QUERIES, KEYS, KEYS), widths, strict=True)
    ]
    if not batched:
        return tuple(x[0] for x in made)  # pyright: ignore[reportReturnType]
    return tuple(made if options.get("batch_first") else (x.transpose(0, 1) for x in made))  # pyright: ignore[reportReturnType]


def pair(kind: str, scheme: str = "w8a16") -> tuple[Any, Any]:
    """torch's, and its model with the twin."""
    model = Model(kind).eval()
    float_module = copy.deepcopy(model.attention)
    return float_module, prepare(model, resolve(model, scheme))


@every_kind
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("returned", [True, False], ids=["weights", "no weights"])
def test_switched_off_it_is_torchs_own(kind: str, mask: str, returned: bool) -> None:
    float_module, model = pair(kind)
    batch, masks = inputs(kind), MASKS[mask]()
    with quantization_off(model):
        y, weights = model.attention(*batch, need_weights=returned, **masks)
    expected, expected_weights = float_module(*batch, need_weights=returned, **masks)
    torch.testing.assert_close(y, expected)
    assert (weights is None) == (expected_weights is None) == (not returned)
    if returned:
        torch.testing.assert_close(weights, expected_weights)
    assert not torch.equal(model.attention(*batch, **masks)[0], expected)


@every_kind
def test_one_sample_alone_and_weights_of_every_head_are_as_torchs(kind: str) -> None:
    float_module, model = pair(kind)
    batch, options = inputs(kind, batched=False), {"average_attn_weights": False}
    options["key_padding_mask"] = torch.arange(KEYS) > 4
    with quantization_off(model):
        for found, expected in zip(
            model.attention(*batch, **options), float_module(*batch, **options), strict=True
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["batch first", "widths of its own"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8-static", "mxfp4"])
def test_it_computes_what_four_quantized_linears_would(kind: str, scheme: str) -> None:
    model, batch = Model(kind).eval(), inputs(kind)
    linears = Linears(copy.deepcopy(model.attention))
    plans = resolve(model, scheme), resolve(linears, scheme)
    one, other = (calibrate(prepare(m, p), [batch]) for m, p in zip((model, linears), plans, strict=True))
    torch.testing.assert_close(one(*batch), other(*batch))
    # a step of what goes into the last Linear may flip where the two sums round differently
    torch.testing.assert_close(convert(one)(*batch), convert(other)(*batch))


@every_kind
def test_every_matrix_is_quantized_trains_converts_and_keeps_its_name(kind: str) -> None:
    float_model, batch = Model(kind), inputs(kind)
    plan = resolve(float_model, "w8a8")
    rows = {row.parameter: row.scheme for row in explain(float_model, plan).rows}
    weights = [name for name in rows if name.endswith("weight")]
    assert {rows[name] for name in weights} == {"w8a8"}
    model = prepare(copy.deepcopy(float_model), plan)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        loss = (model(*batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(model.get_parameter(name).grad.count_nonzero() for name in weights)
    resumed = prepare(float_model, plan)
    resumed.load_state_dict(model.state_dict(), strict=True)
    expected = resumed(*batch)
    assert torch.equal(model(*batch), expected)
    assert torch.equal(convert(model)(*batch), expected)
    state = model.state_dict()
    assert {f"{name}.codes" for name in weights} <= set(state)
    assert not set(weights) & set(state)


def test_layers_of_attention_have_errors() -> None:
    _, model = pair("packed")
    errors = layer_errors(model, inputs("packed"))
    assert set(errors) == {"attention", "attention.out_proj"}
    assert all(0 < error < 0.1 for error in errors.values())


def encoder(**options: Any) -> nn.Module:
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, **options)).eval()


def test_torchs_encoder_asks_quantized_layers_in_evaluation_too() -> None:
    model, x = encoder(enable_nested_tensor=False), torch.randn(BATCH, QUERIES, WIDTH)
    expected = model(x)
    prepare(model, resolve(model, "w4a16"))
    with torch.no_grad():
        without_gradients = model(x)
        assert torch.equal(without_gradients, model.train(mode=False)(x))
        assert (without_gradients - expected).abs().max() > 1e-3
        assert torch.equal(convert(copy.deepcopy(model))(x), without_gradients)
        with quantization_off(model):
            torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), without_gradients)


def test_an_encoder_that_packs_its_inputs_is_refused() -> None:
    model = encoder()
    message = (
        r"^0: nn\.TransformerEncoder packs its inputs for a kernel that takes float weights; build it with "
        r"enable_nested_tensor=False, or set 0\.use_nested_tensor = False first$"
    )
    with pytest.raises(ValueError, match=message):
        prepare(model, resolve(model, "w8a16"))
    model[0].use_nested_tensor = False
    prepare(model, resolve(model, "w8a16"))


def test_nested_tensors_and_a_hint_without_its_mask_are_refused() -> None:
    _, model = pair("batch first")
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(2, WIDTH)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"^nested tensors have no quantized attention; build nn\.Trans"):
        model.attention(nested, nested, nested)
    with pytest.raises(ValueError, match=r"^is_causal says that attn_mask is causal, and there is no attn_m"):
        model.attention(*inputs("batch first"), is_causal=True)


def test_its_last_layer_is_quantized_with_it_or_not_at_all() -> None:
    model = Model("packed")
    rules = ("attention.out_proj", "w8a16"), ("attention", "none")
    message = (
        r"^attention\.out_proj: the MultiheadAttention around it stays in float and reads its weight without "
        r"asking it; quantize both, or none with \{match: attention, scheme: none\}$"
    )
    with pytest.raises(ValueError, match=message):
        prepare(model, resolve(model, recipe("w4a16", *rules)))
    plan = resolve(model, recipe("w4a16", ("attention.out_proj", "none")))
    assert list(plan.modules) == ["attention"]
    assert type(prepare(model, plan).attention) is QuantMultiheadAttention


def test_a_subclass_with_a_forward_of_its_own_keeps_all_its_layers() -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Same(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"other": Other(32, 2), "same": Same(256, 2)})
    plan = resolve(model, "w8a16")
    assert list(plan.modules) == ["same", "same.out_proj"]
    assert plan.kept["other.out_proj.weight"].endswith("Other around it, which reads its weight")


def test_integer_biases_are_refused() -> None:
    message = (
        r"^attention: 'w7a8-ort-static' has biases in steps of the products, and those of a "
        r"MultiheadAttention are floats; use w8a8-ort-static$"
    )
    with pytest.raises(ValueError, match=message):
        resolve(Model("packed"), "w7a8-ort-static")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_refuses_it_before_any_work(target: str) -> None:
    model = Model("packed")
    with pytest.raises(
        ValueError, match=rf"^attention: {target} files do not hold quantized MultiheadAttention yet; keep it"
    ):
        preflight(model, resolve(model, "w8a8"), target)
