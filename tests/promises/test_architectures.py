"""95 % of the matrices of models that nobody listed are quantized without a rule, train, and come back."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import convert, explain, prepare, resolve
from recoup.nn import call, quantization_off
from recoup.numerics import per_channel
from recoup.schemes import PRESETS, Scheme
from recoup.transforms import fold_weight_norm
from tests.models import recipe, run, same
from tests.promises.architectures import ARCHITECTURES, LANGUAGE_AND_VISION

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
MEANT = ("embedding", "head", "norm", "router", "bias", "tied")


def int8() -> Scheme:
    """Weights in 8 bits with a scale for each output, which every width takes."""
    preset = PRESETS["w8a16"]
    return replace(preset, name="int8", weights=replace(preset.weights, granularity=per_channel))


def built(name: str) -> tuple[nn.Module, Any]:
    """The float model of a row, without weight norm, and a batch."""
    torch.manual_seed(0)
    build, batch = ARCHITECTURES[name]
    model = fold_weight_norm(build().eval())
    for parameter in model.parameters():  # transformers leaves some unset
        if parameter.ndim >= 2 or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.1)
    return model, batch()


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors of floats that the model returns."""
    return [found for found in run(model, batch) if found.is_floating_point()]


@every_architecture
def test_nearly_all_matrices_are_quantized_and_the_rest_has_a_reason(name: str) -> None:
    model, _ = built(name)
    plan = resolve(model, int8())
    rows = [row for row in explain(model, plan).rows if len(row.shape) >= 2]
    assert all(row.reason or row.scheme == "int8" for row in rows)
    counted = [row for row in rows if not row.reason.startswith(MEANT)]
    quantized = sum(row.bytes_before for row in counted if row.scheme == "int8")
    assert quantized >= 0.95 * sum(row.bytes_before for row in counted)


@every_architecture
def test_all_of_them_train_convert_and_come_back(name: str) -> None:
    float_model, batch = built(name)
    plan, expected = resolve(float_model, int8()), outputs(float_model, batch)
    model, resumed, empty = (prepare(built(name)[0], plan) for _ in range(3))
    with quantization_off(model):
        for found, exact in zip(outputs(model, batch), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert not same(outputs(model, batch), expected)

    weights = {row.parameter for row in explain(float_model, plan).rows if row.scheme == "int8"}
    assert trained_by(model, batch) & weights == trained_by(float_model, batch) & weights
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    resumed.load_state_dict(model.state_dict(), strict=True)
    trained = outputs(model, batch)
    assert same(outputs(resumed, batch), trained)
    coded = convert(model)
    assert same(outputs(coded, batch), trained)
    convert(empty).load_state_dict(coded.state_dict(), strict=True)
    assert same(outputs(empty, batch), trained)


def trained_by(model: nn.Module, batch: Any) -> set[str]:
    """The parameters that get a gradient of what the model returns."""
    returned = [y for y in call(model, batch).values() if isinstance(y, Tensor) and y.requires_grad]
    torch.stack([y.square().mean() for y in returned]).sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", LANGUAGE_AND_VISION)
def test_the_tower_is_quantized_by_default_and_kept_by_a_rule(name: str) -> None:
    model, batch = built(name)
    tower = next(n for n, _ in model.named_modules() if n.rpartition(".")[2] in ("vision_tower", "visual"))
    of_tower = {n for n in resolve(model, int8()).modules if n.startswith(f"{tower}.")}
    assert {n.rpartition(".")[2] for n in of_tower} & {"qkv", "q_proj"}
    plan = resolve(model, recipe(int8(), (tower, "none")))
    assert set(plan.modules) == set(resolve(model, int8()).modules) - of_tower
    towers = [p.clone() for p in model.get_submodule(tower).parameters()]
    coded = convert(prepare(model, plan))
    assert all(map(torch.equal, coded.get_submodule(tower).parameters(), towers))
    assert all(y.isfinite().all() for y in outputs(coded, batch))
