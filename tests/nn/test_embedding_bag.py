"""Bags of embeddings: the equation in every mode, from float to codes, and what is refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recoup
from recoup.export import preflight
from recoup.nn import quantization_off
from recoup.numerics import dequantize, quantize
from recoup.schemes import PRESETS
from tests.models import recipe

WORDS, WIDTH = 12, 64
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
OFFSETS = torch.tensor([0, 3, 3, 7])  # the second bag is empty
CALLS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "sum": ({"mode": "sum"}, (IDS, OFFSETS)),
    "mean": ({"mode": "mean"}, (IDS, OFFSETS)),
    "max": ({"mode": "max"}, (IDS, OFFSETS)),
    "of-one-length": ({"mode": "mean"}, (IDS.reshape(2, 5),)),
    "weighted": ({"mode": "sum"}, (IDS, OFFSETS, torch.linspace(-1, 2, 10))),
    "padded": ({"mode": "mean", "padding_idx": 5}, (IDS.reshape(2, 5),)),
    "last-offset": ({"mode": "sum", "include_last_offset": True}, (IDS, torch.tensor([0, 4, 10]))),
}
every_call = pytest.mark.parametrize(("options", "given"), CALLS.values(), ids=CALLS)


def by_hand(table: Tensor, options: dict[str, Any], given: tuple[Any, ...]) -> Tensor:
    """Bag after bag, in float64."""
    ids, offsets, weights = (*given, None, None)[:3]
    if ids.ndim == 2:
        offsets, ids = torch.arange(0, ids.numel(), ids.shape[1]), ids.flatten()
    ends = [*offsets.tolist(), *([] if options.get("include_last_offset") else [len(ids)])]
    bags: list[Tensor] = []
    for start, end in pairwise(ends):
        kept = [at for at in range(start, end) if int(ids[at]) != options.get("padding_idx")]
        rows = table.double()[ids[kept]] * (1 if weights is None else weights.double()[kept, None])
        if not kept:
            bags.append(torch.zeros(WIDTH).double())
        else:
            bags.append({"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0)}[options["mode"]])
    return torch.stack(bags)


def prepared(scheme: str, options: dict[str, Any]) -> Any:
    model = nn.Sequential(nn.EmbeddingBag(WORDS, WIDTH, **options))
    return recoup.prepare(model, recoup.resolve(model, recipe(scheme, ("0", scheme))))


@every_call
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "mxfp4a16", "nf4"])
@torch.no_grad()
def test_every_mode_is_the_equation_from_float_to_codes(
    scheme: str, options: dict[str, Any], given: tuple[Any, ...]
) -> None:
    model = prepared(scheme, options)
    bag, spec = model[0], PRESETS[scheme].weights
    qparams = bag.weight_quantizer.qparams(bag.weight)
    table = dequantize(quantize(bag.weight, qparams, spec), qparams, spec)
    y = bag(*given)
    torch.testing.assert_close(y.double(), by_hand(table, options, given), rtol=1e-6, atol=1e-6)
    assert torch.equal(recoup.convert(model)[0](*given), y)


@every_call
def test_the_float_bag_remains_and_gradients_reach_what_is_asked_for(
    options: dict[str, Any], given: tuple[Any, ...]
) -> None:
    as_float = nn.EmbeddingBag(WORDS, WIDTH, **options)
    model = prepared("w8a16", options)
    model[0].weight.data.copy_(as_float.weight.data)
    with quantization_off(model):
        assert torch.equal(model[0](*given), as_float(*given))
    model[0](*given).sum().backward()
    touched = model[0].weight.grad.abs().sum(1) > 0
    assert touched.any()
    assert not touched[[0, 7, 8, 10, 11]].any()  # nobody asks for these


REFUSED = {
    "max_norm": (
        {"max_norm": 1.0},
        "0: an embedding with max_norm rescales its weight as it runs; keep it in",
    ),
    "sparse": ({"sparse": True}, "0: an embedding with sparse gradients asked; build it with sparse=False"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_changes_the_weight_otherwise_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        prepared("w8a16", options)


def test_inputs_that_are_ids_have_no_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"^0: 'w8a8' quantizes inputs, but an embedding's are ids; use w8a16"
    ):
        prepared("w8a8", {})


def test_without_a_rule_it_stays_in_float() -> None:
    model = nn.Sequential(nn.EmbeddingBag(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH))
    assert recoup.resolve(model, "w4a16").kept["0.weight"] == "embedding, kept unless a rule names it"


@pytest.mark.parametrize("target", ["onnx", "onnx-qdq", "pytorch"])
def test_no_target_takes_it_and_each_says_what_to_do(target: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(WORDS, WIDTH))
    plan = recoup.resolve(model, recipe("w8a16", ("0", "w8a16")))
    message = (
        r"^0: a quantized EmbeddingBag has no form in this target; keep it with \{match: 0, scheme: none\}, "
        "or build it of an nn.Embedding and the sum of its vectors$"
    )
    with pytest.raises(ValueError, match=message):
        preflight(model, plan, target)
