"""Another most likely word is allowed where the trained model is undecided, and nowhere else."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from recoup import convert, ptq
from recoup.export.answers import answers, flip_nats
from recoup.export.parity import ParityError
from recoup.numerics import IntFormat
from recoup.schemes import PRESETS

WORDS, PLACES = 6, 2000


def nats(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(dim=-1)


@given(st.lists(st.floats(-8, 8), min_size=2 * WORDS, max_size=2 * WORDS))
def test_no_engine_says_another_word_with_less_divergence(numbers: list[float]) -> None:
    p, q = torch.tensor(numbers, dtype=torch.float64).reshape(2, WORDS).softmax(dim=-1)
    word = q.argmax()
    least = flip_nats(p.log(), word)
    assert nats(p, q) >= least - 1e-12  # float64 sums of numbers below 16
    half_way = p.clone()
    half_way[[int(word), int(p.argmax())]] = (p[word] + p.max()) / 2
    assert float(nats(p, half_way) - least) == pytest.approx(0, abs=1e-12)


def test_the_divergence_of_a_small_gap_is_not_lost_in_rounding() -> None:
    """(P - Q)^2 / (2 (P + Q)) to third order: here 1e-20 / 2."""
    p = torch.tensor([0.5 + 5e-11, 0.5 - 5e-11], dtype=torch.float64)
    assert float(flip_nats(p.log(), torch.tensor(1))) == pytest.approx(5e-21, rel=1e-4)


class Named(nn.Module):
    """A model whose outputs are called logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(x)}


def divergence(model: nn.Module, outputs: Tensor, x: Tensor) -> tuple[float, float]:
    found = answers(Named(model), x)[0].agree({"logits": outputs}, "an engine")
    assert found.nats is not None
    assert found.same_word is not None
    return found.nats, found.same_word


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, WORDS))
    with torch.no_grad():
        model[0].weight.mul_(8)
    coarse = replace(PRESETS["w8a8"].inputs, format=IntFormat(5))  # tenths of a nat at some places
    scheme = replace(PRESETS["w8a8"], name="w8a5", inputs=coarse)
    return convert(ptq(model, scheme, [torch.randn(64, 64)], observer="minmax"))


def words_of(model: nn.Module, gap: float, least: bool) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """The batch, what an engine answers that turns round one pair of words, and which pair that is.

    It is the two most likely words of a place, of which the first is more likely by the factor exp(gap) or
    more, or at most so.
    """
    torch.manual_seed(1)
    x = torch.randn(PLACES, 64)
    outputs = model(x)
    top = outputs.topk(2, dim=-1)
    gaps = top.values[:, 0] - top.values[:, 1]
    place = int((gaps > gap if least else gaps < gap).nonzero()[0])
    first, second = (int(word) for word in top.indices[place])
    turned = outputs.clone()
    turned[place, [first, second]] = outputs[place, [second, first]]
    return x, turned, (place, first, second)


@torch.no_grad()
def test_one_confident_word_among_thousands_that_is_another_is_found(model: nn.Module) -> None:
    x, turned, (place, first, second) = words_of(model, 4.0, least=True)
    mean = nats(model(x).softmax(-1), turned.softmax(-1)).mean()
    message = f"in an engine the most likely word at place {place} is {second}, trained is {first}: that"
    with pytest.raises(ParityError, match=message):
        divergence(model, turned, x)
    # the place tells, not the mean: as much is explained where it is spread over all places
    noise = torch.randn_like(turned)
    once = nats(model(x).softmax(-1), (model(x) + noise).softmax(-1)).mean()
    found, same = divergence(model, model(x) + noise * (mean / once) ** 0.5, x)
    assert found > mean / 2
    assert same < 1


@torch.no_grad()
def test_a_word_that_is_nearly_as_likely_may_be_another(model: nn.Module) -> None:
    x, turned, _ = words_of(model, 0.01, least=False)
    _, same = divergence(model, turned, x)
    assert same == 1 - 1 / PLACES


@torch.no_grad()
def test_with_float_inputs_rounding_explains_hardly_any(model: nn.Module) -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(64, WORDS))
    model = convert(ptq(floats, "w8a16", [torch.randn(64, 64)], observer="minmax"))
    x, turned, _ = words_of(model, 0.01, least=False)
    with pytest.raises(ParityError, match="in an engine the"):
        divergence(model, turned, x)
