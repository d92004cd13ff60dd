"""A teacher that is asked once: what its answers on disk say, and that training on them is the same."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import train
from recoup.train import float_copy
from recoup.train.fingerprint import fingerprint
from recoup.train.top_logits import TopLogits

from .test_train import batches, prepared, settings

CLASSES = 12


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Of log-probabilities, in float64."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def as_one(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Those of the classes, and of all others together."""
    of = log_probabilities.gather(-1, classes)
    others = torch.ones_like(log_probabilities).scatter(-1, classes, 0.0)
    rest = (log_probabilities.exp() * others).sum(-1, keepdim=True)
    return torch.cat([of, rest.log()], -1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, CLASSES - 1, CLASSES, 2 * CLASSES])
def test_the_divergence_takes_all_other_classes_as_one(k: int, temperature: float) -> None:
    t, s = 3 * torch.randn(2, 3, CLASSES), 3 * torch.randn(2, 3, CLASSES)
    teacher, student = ((x.double() / temperature).log_softmax(-1) for x in (t, s))
    found = TopLogits.of(t, k, temperature).divergence((s / temperature).log_softmax(-1))
    whole = kl(teacher, student)
    if k >= CLASSES:
        expected = whole
    else:
        top = teacher.topk(k).indices
        expected = kl(as_one(teacher, top), as_one(student, top))
        assert (expected <= whole + 1e-12).all()  # the log sum inequality
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_rest_of_nothing_has_a_finite_gradient() -> None:
    """A teacher and a student who are both sure: nothing is left for the other classes."""
    logits = torch.tensor([200.0, 0.0, -50.0, -60.0], requires_grad=True)
    TopLogits.of(logits.detach(), 2, 1.0).divergence(logits.log_softmax(-1)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


KEPT = {"loss": "logits-kl", "steps": 4, "teacher_logits": 2 * CLASSES, "evaluate_every": 2}


class Asked(nn.Module):
    """A teacher that counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model, self.times = float_copy(prepared()), 0

    def forward(self, **batch: Any) -> Any:
        self.times += 1
        return self.model(**batch)


def trained(
    folder: Path | None,
    teacher: nn.Module | None = None,
    record: Callable[..., Any] = lambda _: None,
    **fields: Any,
) -> str:
    torch.manual_seed(3)
    model, data, given = prepared(), batches(3, labels=True), settings(**(KEPT | fields))
    train(model, data[1:], given, teacher=teacher, held_out=data[:1], record=record, checkpoints=folder)
    return fingerprint(model.state_dict())


def test_with_all_classes_training_follows_the_teacher_in_memory(tmp_path: Path) -> None:
    """The same numbers but for the order of two sums, and the same held-out losses."""
    kept, asked = list[Any](), list[Any]()
    trained(tmp_path, record=kept.append)
    trained(None, record=asked.append, teacher_logits=None)
    assert [entry["loss"] for entry in kept[1:]] == pytest.approx(
        [entry["loss"] for entry in asked[1:]], rel=1e-3
    )
    assert [e["held_out"] for e in kept if "held_out" in e] == pytest.approx(
        [e["held_out"] for e in asked if "held_out" in e], rel=1e-3
    )


def test_the_teacher_is_asked_once_for_every_batch_and_never_again(tmp_path: Path) -> None:
    teacher = Asked().train()
    first = trained(tmp_path, teacher)
    assert teacher.times == 3  # two of training and one held out
    assert teacher.training
    assert trained(tmp_path, teacher) == first
    assert teacher.times == 3


def test_nothing_is_copied_where_the_model_is_its_own_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["recoup.train.train"], "float_copy", None)
    trained(tmp_path, float_copy(prepared()))
    trained(tmp_path / "own")


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path) -> None:
    teacher = Asked()
    expected = trained(tmp_path, teacher)
    answer = next((tmp_path / "teacher").iterdir()) / "answer.safetensors"
    answer.write_bytes(answer.read_bytes()[:-1])
    assert trained(tmp_path, teacher) == expected
    assert teacher.times == 4


def test_an_interrupted_asking_goes_on(tmp_path: Path) -> None:
    class Interrupted(Asked):
        def forward(self, **batch: Any) -> Any:
            if self.times == 2:
                raise KeyboardInterrupt
            return super().forward(**batch)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Interrupted())
    teacher = Asked()
    trained(tmp_path, teacher)
    assert 0 < teacher.times < 3 or fingerprint(teacher.state_dict()) != fingerprint(
        Interrupted().state_dict()
    )


def test_answers_belong_to_one_teacher(tmp_path: Path) -> None:
    trained(tmp_path, Asked())
    with pytest.raises(
        ValueError, match=r"holds the answers of a teacher with other teacher, teacher_logits; go on"
    ):
        trained(tmp_path, teacher_logits=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss": "hidden-mse"},
            "teacher_logits: kept for logits-kl, and the loss is hidden-mse; take logits-kl, or",
        ),
        ({"loss": "task"}, "teacher_logits: kept for logits-kl, and the loss is task; take logits-kl, or"),
        ({"teacher_logits": 0}, "greater than or equal to 1"),
    ],
)
def test_what_answers_on_disk_are_not_for(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**(KEPT | fields))


def test_answers_on_disk_need_a_folder() -> None:
    with pytest.raises(
        ValueError, match="teacher_logits: a teacher's answers lie beside the checkpoints; pass"
    ):
        trained(None)
