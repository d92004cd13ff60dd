"""Every loss against the equation, written with numbers in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recoup.schemes.training import LOSSES as NAMES
from recoup.train import LOSSES
from recoup.train.losses import build_loss, needs_teacher

HIDDEN, EMBEDDING = ("last_hidden_state", "hidden_state"), ("sentence_embedding", "pooler_output")
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 sum p log(p / q), p the teacher's, of one position."""
    p, q = softmax(teacher.tolist(), temperature), softmax(student.tolist(), temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def square(student: Tensor, teacher: Tensor) -> float:
    return sum((a - b) ** 2 for a, b in zip(student.tolist(), teacher.tolist(), strict=True))


def cosine(student: Tensor, teacher: Tensor) -> float:
    s, t = student.tolist(), teacher.tolist()
    dot = sum(a * b for a, b in zip(s, t, strict=True))
    return dot / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))


def positions(mask: Tensor | None) -> list[tuple[int, int]]:
    kept = torch.ones(2, 3) if mask is None else mask
    return [(i, j) for i in range(2) for j in range(3) if kept[i, j]]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_kl(mask: Tensor | None, temperature: float) -> None:
    s, t = drawn(2, 3, 5)
    batch = {} if mask is None else {"attention_mask": mask}
    found = LOSSES["logits-kl"](temperature)({"logits": s}, {"logits": t}, batch)
    at = positions(mask)
    assert float(found) == pytest.approx(sum(kl(s[p], t[p], temperature) for p in at) / len(at), rel=1e-5)
    assert float(LOSSES["logits-kl"](temperature)({"logits": t}, {"logits": t}, batch)) == 0.0


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("key", HIDDEN)
def test_hidden_states(mask: Tensor | None, key: str) -> None:
    s, t = drawn(2, 3, 5)
    batch = {} if mask is None else {"attention_mask": mask}
    at = positions(mask)
    relative = sum(square(s[p], t[p]) for p in at) / sum(square(t[p], 0 * t[p]) for p in at)
    angle = sum(1 - cosine(s[p], t[p]) for p in at) / len(at)
    assert float(LOSSES["hidden-mse"](1.0)({key: s}, {key: t}, batch)) == pytest.approx(relative, rel=1e-5)
    assert float(LOSSES["hidden-cosine"](1.0)({key: s}, {key: t}, batch)) == pytest.approx(angle, rel=1e-5)


@pytest.mark.parametrize("key", [*EMBEDDING, None], ids=str)
def test_embeddings(key: str | None) -> None:
    s, t = drawn(4, 5)
    student, teacher = (s, t) if key is None else ({key: s}, {key: t})
    batch = {"attention_mask": MASK}  # of tokens: an embedding has none
    relative = square(s.flatten(), t.flatten()) / square(t.flatten(), 0 * t.flatten())
    angle = sum(1 - cosine(s[i], t[i]) for i in range(4)) / 4
    assert float(LOSSES["embedding-mse"](1.0)(student, teacher, batch)) == pytest.approx(relative, rel=1e-5)
    assert float(LOSSES["embedding-cosine"](1.0)(student, teacher, batch)) == pytest.approx(angle, rel=1e-5)


@pytest.mark.parametrize("name", ["logits-kl", "hidden-mse", "hidden-cosine"])
def test_what_is_masked_has_no_gradient(name: str) -> None:
    s, t = drawn(2, 3, 5)
    key = "logits" if name == "logits-kl" else "last_hidden_state"
    LOSSES[name](2.0)({key: s.requires_grad_()}, {key: t}, {"attention_mask": MASK}).backward()
    assert s.grad is not None
    assert ((s.grad.abs().sum(dim=-1) > 0) == MASK.bool()).all()


def test_task_is_the_models_own_and_a_mixture_is_a_sum() -> None:
    s, t = drawn(2, 3, 5)
    student, teacher = {"loss": torch.tensor(3.0), "logits": s}, {"logits": t}
    assert float(build_loss("task", 1.0, None)(student, None, {})) == 3.0
    alone = float(build_loss("logits-kl", 2.0, None)(student, teacher, {}))
    mixed = build_loss({"task": 0.3, "logits-kl": 0.7}, 2.0, None)(student, teacher, {})
    assert float(mixed) == pytest.approx(0.3 * 3.0 + 0.7 * alone, rel=1e-6)
    assert not needs_teacher("task")
    assert not needs_teacher({"task": 2.0})
    assert needs_teacher({"task": 0.5, "hidden-mse": 0.5})
    assert needs_teacher("distill")


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ({"logits": torch.ones(2, 3), "last_hidden_state": torch.ones(2, 3)}, "logits-kl"),
        ({"last_hidden_state": torch.ones(2, 3), "pooler_output": torch.ones(2, 3)}, "hidden-mse"),
        ({"pooler_output": torch.ones(2, 3)}, "embedding-mse"),
        (torch.ones(2, 3), "embedding-mse"),
    ],
)
def test_distill_follows_what_the_teacher_returns(output: Any, name: str) -> None:
    student = (
        {key: torch.randn_like(v) for key, v in output.items()} if isinstance(output, dict) else output * 2
    )
    found = build_loss("distill", 1.0, output)(student, output, {})
    assert torch.equal(found, LOSSES[name](1.0)(student, output, {}))


def test_the_names_are_those_of_the_recipe() -> None:
    assert set(LOSSES) == set(NAMES)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        ValueError, match="the loss needs loss; the model returns logits: give the batches labels"
    ):
        build_loss("task", 1.0, None)({"logits": torch.ones(1)}, None, {})
    with pytest.raises(ValueError, match="the loss needs loss; the model returns Tensor: give the batches"):
        build_loss("task", 1.0, None)(torch.ones(1), None, {})
    with pytest.raises(ValueError, match="the loss needs logits; the model returns states: choose another"):
        build_loss("logits-kl", 1.0, None)({"states": torch.ones(1)}, {"states": torch.ones(1)}, {})
    with pytest.raises(
        ValueError, match="distill: the model returns states; it needs a tensor, or one of logits"
    ):
        build_loss("distill", 1.0, {"states": torch.ones(1)})
