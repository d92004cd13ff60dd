"""`load` finds the task; `asking` leaves no trace."""

import pytest
import torch
from torch import nn

from recoup.schemes import Recipe
from recoup.tasks import load
from recoup.tasks.task import asking

from .conftest import recipe


def test_a_recipe_without_task_says_what_to_write() -> None:
    with pytest.raises(
        ValueError, match=r"no task; write task: \{name: \.\.\.\} with one of causal-lm, sentence-embedding"
    ):
        load(Recipe.model_validate({"scheme": "w8a8"}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sentence-embeding", "did you mean 'sentence-embedding'"),
        ("zzz", "there are causal-lm, sentence-embedding"),
    ],
)
def test_an_unknown_task_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"no task {name!r}; {hint}"):
        load(recipe({"name": name}))


def test_asking_restores_every_training_flag_even_after_an_error() -> None:
    def fails(device: torch.device) -> None:
        assert (device.type, model.training, torch.is_inference_mode_enabled()) == ("cpu", False, True)
        raise RuntimeError

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    model[1].eval()  # a frozen norm
    with pytest.raises(RuntimeError), asking(model) as device:
        fails(device)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_module_without_tensors_is_on_the_cpu() -> None:
    with asking(nn.Identity()) as device:
        assert device == torch.device("cpu")
