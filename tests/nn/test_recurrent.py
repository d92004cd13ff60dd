"""LSTM and GRU: the twin is torch's own module with rounded weights, and nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from recoup import calibrate, convert, explain, prepare, resolve
from recoup.calibrate import gptq
from recoup.export import TARGETS, export, preflight
from recoup.nn import QuantGRU, QuantLSTM, quantization_off, quantizers_of
from recoup.numerics import dequantize, qparams_of, quantize
from recoup.schemes import PRESETS
from tests.models import recipe

WIDTH = 64
KINDS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(WIDTH, 32, batch_first=True),
    "gru": lambda: nn.GRU(WIDTH, 32, batch_first=True),
    "lstm, two layers, both ways, projected": lambda: nn.LSTM(
        WIDTH, 64, num_layers=2, bidirectional=True, proj_size=32
    ),
    "gru, two layers, both ways, no bias": lambda: nn.GRU(
        WIDTH, 32, num_layers=2, bidirectional=True, bias=False
    ),
}
# torch says so of the float module too
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
every_scheme = pytest.mark.parametrize("scheme", ["w4a16", "nvfp4a16", "mxfp4a16", "q8_0a16", "w1.58a16-seq"])


class Model(nn.Module):
    """One of them and a head."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent: Any = recurrent
        self.head = nn.Linear(recurrent.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


def sequences() -> Tensor:
    return torch.randn(3, 5, WIDTH)


def weights(module: nn.RNNBase) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]


def ready(build: Any, scheme: Any = "w4a16") -> Any:
    model = Model(build())
    return calibrate(prepare(model, resolve(model, scheme)), [sequences()])


def rounded(module: nn.RNNBase, scheme: str) -> nn.RNNBase:
    """The oracle: torch's module whose weights were rounded by the definitions."""
    spec = PRESETS[scheme].weights
    for name in weights(module):
        weight = getattr(module, name)
        qparams = qparams_of(weight.detach(), spec)
        weight.data.copy_(dequantize(quantize(weight.detach(), qparams, spec), qparams, spec))
    return module


@every_kind
@every_scheme
def test_it_is_torchs_own_module_with_rounded_weights(build: Any, scheme: str) -> None:
    module, x = build(), sequences()
    model = Model(copy.deepcopy(module))
    model = prepare(model, resolve(model, scheme))
    y, state = model.recurrent(x)
    expected, expected_state = rounded(module, scheme)(x)
    assert torch.equal(y, expected)
    for one, other in zip(state, expected_state, strict=True):
        assert torch.equal(one, other)


@every_kind
def test_switched_off_it_is_the_float_module_and_afterwards_it_is_not(build: Any) -> None:
    module, x = build(), sequences()
    model = Model(copy.deepcopy(module))
    model = prepare(model, resolve(model, "w4a16"))
    with quantization_off(model):
        assert torch.equal(model(x), module(x)[0])
    assert not torch.equal(model(x), module(x)[0])


def test_sequences_of_several_lengths_and_a_first_state_go_in_as_ever() -> None:
    module = KINDS["lstm"]()
    model = Model(copy.deepcopy(module))
    model = prepare(model, resolve(model, "w8a16"))
    packed = pack_padded_sequence(sequences(), torch.tensor([5, 3, 2]), batch_first=True)
    state = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    y, _ = model.recurrent(packed, state)
    expected, _ = rounded(module, "w8a16")(packed, state)
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.data, expected.data)


@every_kind
def test_every_matrix_is_quantized_trains_and_keeps_its_name(build: Any) -> None:
    float_model = Model(build())
    plan = resolve(float_model, "w4a16")
    schemes = {row.parameter: row.scheme for row in explain(float_model, plan).rows}
    names = weights(float_model.recurrent)
    assert {schemes[f"recurrent.{name}"] for name in names} == {"w4a16"}
    model, x = prepare(copy.deepcopy(float_model), plan), sequences()
    assert set(float_model.state_dict()) <= set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (model(x) - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(model.recurrent.get_parameter(name).grad.count_nonzero() for name in names)
    resumed = prepare(float_model, plan)
    resumed.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(resumed(x), model(x))


@every_kind
@torch.no_grad()  # weights with gradients have other kernels in torch, and on some processors other bits
def test_converting_changes_no_bit_and_codes_survive_copies_and_casts(build: Any) -> None:
    model, x = ready(build), sequences()
    expected = model(x)
    coded = convert(copy.deepcopy(model))
    assert torch.equal(coded(x), expected)
    assert torch.equal(copy.deepcopy(coded)(x), expected)
    assert torch.equal(model(x), expected)
    names = weights(model.recurrent)
    assert {f"recurrent.{name}.codes" for name in names} <= set(coded.state_dict())
    assert not {f"recurrent.{name}" for name in names} & set(coded.state_dict())
    assert coded.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_parameter_that_was_replaced_is_rounded_too() -> None:
    model, x = ready(KINDS["gru"]), sequences()
    before = model(x)
    replaced = 2 * model.recurrent.weight_ih_l0.detach()
    model.recurrent.weight_ih_l0 = nn.Parameter(replaced)
    quantizer = quantizers_of(model.recurrent)["weight_ih_l0"]
    assert torch.equal(model.recurrent.rounded("weight_ih_l0"), quantizer(replaced))
    assert not torch.equal(model(x), before)
    float_module = KINDS["gru"]()
    float_module.load_state_dict(
        {name: model.recurrent.rounded(name) for name, _ in float_module.named_parameters()}
    )
    assert torch.equal(model(x), float_module(x)[0])


def test_schemes_that_quantize_inputs_are_refused() -> None:
    for name, kind in (("lstm", "LSTM"), ("gru", "GRU")):
        message = (
            rf"^recurrent: 'w8a8' quantizes inputs, and the state of an nn\.{kind} stays in float from step "
            r"to step; use w8a16 or w4a16, or keep it in float$"
        )
        with pytest.raises(ValueError, match=message):
            resolve(Model(KINDS[name]()), "w8a8")


def test_widths_that_no_group_divides_name_the_weight() -> None:
    message = r"^recurrent\.weight_hh_l0: 33 columns cannot be cut into groups of 32; use per_channel"
    with pytest.raises(ValueError, match=message):
        resolve(Model(nn.LSTM(WIDTH, 33)), "w4a16")


def test_gptq_moves_the_linears_around_it_and_nothing_of_it() -> None:
    model = Model(KINDS["gru"]())
    model = calibrate(prepare(model, resolve(model, recipe("w4a16", ("head", "w4a16")))), [sequences()])
    model.forward = lambda x: model.head(model.recurrent(x)[0])
    before = copy.deepcopy(model.state_dict())
    gptq(model, [sequences()])
    moved = {name for name, state in model.state_dict().items() if not torch.equal(state, before[name])}
    assert "head.weight" in moved
    assert all(name.startswith("head.") for name in moved)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_refuses_them_before_any_work(target: str, kind: str, tmp_path: Any) -> None:
    message = (
        rf"^recurrent: {target} files do not hold quantized {kind} yet; keep it in float with \{{match: "
    )
    model = Model(KINDS[kind.lower()]())
    plan = resolve(model, "w8a16")
    with pytest.raises(ValueError, match=message):
        preflight(model, plan, target)
    with pytest.raises(ValueError, match=message):
        export(calibrate(prepare(model, plan), [sequences()]), tmp_path / "artefact", target)


def test_the_twins_are_torchs_modules() -> None:
    assert isinstance(ready(KINDS["lstm"]).recurrent, QuantLSTM)
    assert isinstance(ready(KINDS["gru"]).recurrent, QuantGRU)
