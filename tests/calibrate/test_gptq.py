"""GPTQ: against the algorithm written out with an explicit inverse, and what it promises to the rest."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recoup
from recoup.calibrate import calibrate, gptq
from recoup.calibrate.gptq import _order
from recoup.numerics import IntFormat, QuantSpec, per_channel
from recoup.schemes import PRESETS, Scheme
from tests.models import MODELS, Row, built, name_of, recipe, run

INPUTS, OUTPUTS = 64, 32


def correlated(samples: int = 256) -> Tensor:
    """Inputs whose features follow each other: without that there is nothing to make up for."""
    return torch.randn(samples, INPUTS) @ torch.randn(INPUTS, INPUTS)


def prepared(scheme: Scheme | str, x: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    return calibrate(recoup.prepare(model, recoup.resolve(model, scheme)), [x], observer="mse")


def by_elimination(weight: np.ndarray, x: np.ndarray, scale: np.ndarray, lo: int, hi: int) -> np.ndarray:
    """Optimal brain quantization, large inputs first: after each column its row and column leave the inverse.

    Frantar et al. 2022 (arXiv:2210.17323), equations 2 and 3, with the damping of section 3.3.
    """
    hessian = x.T @ x
    hessian += 0.1 * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse, weight = np.linalg.inv(hessian), weight.copy()
    codes = np.empty_like(weight)
    for j in np.argsort(-np.square(x).sum(axis=0)):
        codes[:, j] = np.clip(np.rint(weight[:, j] / scale), lo, hi)
        error = (weight[:, j] - codes[:, j] * scale) / inverse[j, j]
        weight -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_codes_are_those_of_elimination_column_by_column(bits: int) -> None:
    grid = IntFormat(bits)
    weights = QuantSpec(format=grid, granularity=per_channel, scale_rule="half-range", ranges="static")
    x = correlated()
    model = prepared(Scheme(name="rows", weights=weights), x)
    layer: Any = model[0]
    weight = layer.weight.detach().double().numpy()
    gptq(model, [x])
    scale = layer.weight_quantizer.scale[:, 0].double().numpy()
    expected = by_elimination(weight, x.double().numpy(), scale, int(grid.lo), int(grid.hi))
    codes = recoup.convert(model)[0].weight.codes.numpy()
    # The factor is float32: a value beside a tie may fall the other way, and moves what follows in its row.
    assert (codes == expected).mean() > 0.995


@pytest.mark.parametrize("name", ["w2a16", "w3a16", "w4a16", "w4a8", "mxfp4", "nvfp4", "fp8", "w8a8-static"])
def test_outputs_lose_less_than_by_rounding_to_nearest(name: str) -> None:
    x = correlated()
    model = prepared(name, x)
    with torch.no_grad():
        exact = nn.functional.linear(x, model[0].weight, model[0].bias)
        nearest = (model(x) - exact).norm()
        assert (gptq(model, [x])(x) - exact).norm() < nearest


@pytest.mark.parametrize("row", MODELS, ids=name_of)
def test_every_model_can_be_converted_after_it(row: Row) -> None:
    model, batch = built(row), row.batch()
    scheme = "w8a8-static" if row.name in ("cnn", "conv1d", "conv3d") else "w4a16"
    recoup.prepare(model, recoup.resolve(model, recipe(scheme)))
    calibrate(model, [batch])
    if not any(getattr(m, "inputs_are", None) == "tokens" for m in model.modules()):
        return
    gptq(model, [batch])
    before = run(model, batch)
    after = run(recoup.convert(model), batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_batches_go_through_as_one() -> None:
    x = correlated()
    torch.manual_seed(1)
    whole = gptq(prepared("w4a16", x), [x])
    torch.manual_seed(1)
    parts = gptq(prepared("w4a16", x), list(x.split(64)))
    assert torch.equal(whole[0].weight, parts[0].weight)


def test_a_tied_weight_stays_as_it_is() -> None:
    row = next(row for row in MODELS if row.name == "tied")
    model, batch = built(row), row.batch()
    weights_only = [("tokens", PRESETS["w4a16"]), ("lm_head", PRESETS["w4a16"])]
    recoup.prepare(model, recoup.resolve(model, recipe("w4a16", *weights_only)))
    calibrate(model, [batch])
    before = model.tokens.weight.clone()
    gptq(model, [batch])
    assert torch.equal(model.tokens.weight, before)


def test_no_hook_and_no_mode_is_left() -> None:
    x = correlated()
    model = prepared("w4a16", x).train()
    gptq(model, [x])
    assert model.training
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def _unreached() -> tuple[nn.Module, list[Tensor]]:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(INPUTS, 32), nn.Linear(INPUTS, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    x = correlated()
    return calibrate(recoup.prepare(model, recoup.resolve(model, "w4a16")), [x]), [x]


def _dynamic() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    return recoup.prepare(model, recoup.resolve(model, recipe("w4a16", weight_ranges="dynamic"))), [
        correlated()
    ]


def _uncalibrated() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    return recoup.prepare(model, recoup.resolve(model, "w8a8-static")), [correlated()]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (nn.Linear(4, 4), [torch.ones(1, 4)]), "gptq: the model is not prepared"),
        (_uncalibrated, r"0\.input: its range is not known; run recoup\.calibrate"),
        (_dynamic, r"0\.weight: its scales follow the weight, and gptq decides them; use static ranges"),
        (_unreached, r"unused\.weight: no batch reaches it, so GPTQ knows no inputs of it"),
        (lambda: (prepared("w4a16", correlated()), []), "gptq: no batches"),
        (
            lambda: (prepared("w4a16", correlated()), [torch.ones(2, 3, INPUTS), torch.ones(2, 4, INPUTS)]),
            "gptq: the calibration batches have different shapes, and go through the model as one",
        ),
    ],
    ids=["float", "uncalibrated", "dynamic", "unreached", "empty", "ragged"],
)
def test_what_it_refuses(build: Any, message: str) -> None:
    model, batches = build()
    with pytest.raises(ValueError, match=message):
        gptq(model, batches)


class Twice(nn.Module):
    """One layer that runs twice, and one that is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(input=torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def test_a_layer_that_runs_twice_stays_and_one_called_by_name_does_not() -> None:
    model, x = Twice(), correlated()
    calibrate(recoup.prepare(model, recoup.resolve(model, "w2a16")), [x])
    twice, once = model.twice.weight.clone(), model.once.weight.clone()
    gptq(model, [x])
    assert torch.equal(model.twice.weight, twice)
    assert not torch.equal(model.once.weight, once)


@pytest.mark.parametrize("name", ["w2a16", "w4a16", "q4_1"])
@torch.no_grad()
def test_the_first_groups_scales_are_those_of_the_least_error_weighted_by_inputs(name: str) -> None:
    first = slice(32, 64)  # where inputs weigh most
    deviations = torch.logspace(-1, 1, 128)
    deviations[first] += 100
    x = torch.randn(64, 128) * deviations
    model = nn.Sequential(nn.Linear(128, 128))
    calibrate(recoup.prepare(model, recoup.resolve(model, name)), [x], observer="mse")
    quantizer, weight = model[0].weight_quantizer, model[0].weight.clone()

    def lost() -> Tensor:
        return ((quantizer(weight) - weight).square() * x.square().sum(0))[:, first].sum()

    of_equal_weights = lost()
    gptq(model, [x])
    assert lost() < of_equal_weights


@pytest.mark.parametrize("name", ["w8a8", "fp8-static", "w7a8-ort-static"])
def test_scales_of_rows_and_tensors_stay_as_calibrated(name: str) -> None:
    """Siblings may share them, and biases may have made room in them."""
    x = correlated()
    model = prepared(name, x)
    quantizer: Any = model[0].weight_quantizer
    with torch.no_grad():
        quantizer.scale.mul_(1.5)  # as whoever settles the lattice for an engine does
    before, weight = quantizer.scale.clone(), model[0].weight.detach().clone()
    gptq(model, [x])
    assert torch.equal(quantizer.scale, before)
    assert not torch.equal(model[0].weight, weight)


def test_a_global_scale_stays_as_calibrated() -> None:
    x = correlated()
    model = prepared("nvfp4a16", x)
    quantizer: Any = model[0].weight_quantizer
    before = quantizer.global_scale.clone(), quantizer.scale.clone()
    gptq(model, [x])
    assert torch.equal(quantizer.global_scale, before[0])
    assert not torch.equal(quantizer.scale, before[1])


@pytest.mark.parametrize("size", [1, 4, 12])
def test_columns_of_a_group_are_rounded_together_the_most_important_first(size: int) -> None:
    importance = torch.rand(12)
    order = _order(importance, size).view(-1, size)
    assert sorted(order.flatten().tolist()) == list(range(12))
    assert all(len(set(group)) == 1 for group in (order // size).tolist())
    assert (importance[order].diff(dim=1) <= 0).all()
    assert (importance[order].sum(dim=1).diff() <= 0).all()


def _of(scheme: str) -> tuple[nn.Module, list[Tensor]]:
    return prepared(scheme, correlated()), [correlated()]


@pytest.mark.parametrize(
    ("build", "samples", "message"),
    [
        (lambda: _of("w4a16"), 1000, "gptq: 1000 samples asked, 256 found; bring more, or ask for fewer"),
        (
            lambda: (_of("w4a16")[0].to(torch.bfloat16), [correlated()]),
            None,
            r"0\.weight: torch\.bfloat16 cannot hold what gptq decides; call model\.float\(\) before",
        ),
        (
            lambda: (
                recoup.prepare(
                    model := nn.Sequential(nn.Conv1d(4, 4, 3)), recoup.resolve(model, "w8a8-static")
                ),
                [torch.ones(2, 4, 8)],
            ),
            None,
            "gptq: the plan quantizes no linear layer with a weight of its own; leave it out",
        ),
    ],
    ids=["too few", "bfloat16", "nothing to move"],
)
def test_what_else_it_refuses(build: Any, samples: int | None, message: str) -> None:
    model, batches = build()
    with pytest.raises(ValueError, match=message):
        gptq(model, batches, samples=samples)
