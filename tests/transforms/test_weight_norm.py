"""Weight norm folds into the weight that it computes, and that is quantized."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from recoup import prepare, resolve
from recoup.transforms import fold_weight_norm, fuse


def by_hook(module: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
        return nn.utils.weight_norm(module, **options)


FORMS: dict[str, Callable[..., nn.Module]] = {
    "parametrization": nn.utils.parametrizations.weight_norm,
    "hook": by_hook,
}
every_form = pytest.mark.parametrize("normed", FORMS.values(), ids=FORMS)


def model_of(normed: Callable[..., nn.Module]) -> nn.Sequential:
    """A convolution as wav2vec 2.0's, normalized along its last axis, and a plain one."""
    return nn.Sequential(
        normed(nn.Conv1d(8, 16, 3), dim=2), nn.ReLU(), nn.Conv1d(16, 16, 1), normed(nn.Conv1d(16, 4, 1))
    )


@every_form
def test_the_function_stays_and_the_weight_is_a_parameter(normed: Callable[..., nn.Module]) -> None:
    model, x = model_of(normed), torch.randn(2, 8, 5)
    expected = model(x)
    assert fold_weight_norm(model) is model
    assert [type(model[i]) for i in (0, 2, 3)] == [nn.Conv1d] * 3
    assert {name for name, _ in model.named_parameters()} == {
        f"{i}.{leaf}" for i in (0, 2, 3) for leaf in ("weight", "bias")
    }
    assert torch.equal(model(x), expected)
    folded = copy.deepcopy(model)
    assert torch.equal(fold_weight_norm(model)(x), folded(x))


@every_form
def test_resolve_names_the_remedy_and_fuse_is_one_too(normed: Callable[..., nn.Module]) -> None:
    model, x = model_of(normed), torch.randn(2, 8, 5)
    with pytest.raises(ValueError, match=r"before recoup\.transforms\.fold_weight_norm\)"):
        resolve(model, "w8a8-static")
    expected = model(x)
    plan = resolve(fuse(model, x), "w8a8-static")
    assert list(plan.modules) == ["0", "2", "3"]
    assert torch.equal(model(x), expected)
    prepare(model, plan)


@every_form
@pytest.mark.parametrize("trainable", [True, False])
def test_what_was_frozen_stays_frozen(normed: Callable[..., nn.Module], trainable: bool) -> None:
    model = model_of(normed).requires_grad_(trainable)
    with torch.no_grad():
        fold_weight_norm(model)
    assert all(parameter.requires_grad == trainable for parameter in model.parameters())


def test_other_parametrizations_stay() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
    fold_weight_norm(nn.Sequential(layer))
    assert parametrize.is_parametrized(layer, "weight")
