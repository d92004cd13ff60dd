"""A small classifier, a scripted evaluation, and the stand-in for a target."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup import Recipe

from .stand_in import install

WIDTH = 32


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.down(torch.relu(self.up(x)))))}


def batches(count: int, samples: int = 32) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(samples, WIDTH)} for _ in range(count)]


def labels(x: Tensor) -> Tensor:
    return x[:, :4].argmax(dim=1)


@pytest.fixture(scope="session")
def fitted_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in batches(200, 64):
        F.cross_entropy(model(**batch)["logits"], labels(batch["x"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture
def model(fitted_state: dict[str, Tensor]) -> Classifier:
    model = Classifier()
    model.load_state_dict(fitted_state)
    return model.eval()


def scripted(*right: float | Sequence[float], samples: int = 100) -> Callable[[nn.Module], dict[str, Any]]:
    """An `evaluate` that finds so many samples right: of the float model, of each rung, of the file.

    `evaluate.models` are the models that it was asked about.
    """
    left = list(right)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        evaluate.models.append(model)
        count = left.pop(0)
        if isinstance(count, float):
            return {"accuracy": [count] * samples}
        return {"accuracy": [1] * count + [0] * (samples - count)}

    evaluate.models = []
    evaluate.left = left
    return evaluate


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in target, and no type checks."""
    install(monkeypatch)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def recipe(scheme: str = "w2a8", **fields: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "scheme": scheme,
            "gates": [{"metric": "accuracy", "max_decrease": "10%"}],
            "calibration": {"samples": 64},
            "train": {"steps": 3, "learning_rate": 1e-3, "evaluate_every": 2},
        }
        | fields
    )
