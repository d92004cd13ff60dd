"""What training minimizes: the model's own loss, or the distance to the float teacher.

A loss takes what the student returned, what the teacher returned and the batch, and gives one number.
Distances of hidden states and embeddings are relative to the teacher's, so that one learning rate suits
models of any width. Padding, where the batch has an attention mask, does not count.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.nn import Batch
from recoup.train.top_logits import TopLogits

Loss = Callable[[Any, Any, Batch], Tensor]

_HIDDEN = ("last_hidden_state", "hidden_state")
_EMBEDDING = ("sentence_embedding", "embeddings", "text_embeds", "image_embeds", "pooler_output")


def build_loss(loss: str | dict[str, float], temperature: float, teacher_output: Any) -> Loss:
    """The loss of a recipe.

    Args:
        loss: a name of `LOSSES`, a weighted mixture of them, or "distill": the first of logits-kl,
            hidden-mse and embedding-mse that the teacher's output has the tensors for.
        temperature: of logits-kl.
        teacher_output: of one batch, or None where the loss needs no teacher.

    Raises:
        ValueError: the teacher's output has none of them.
    """
    names = (
        {_distill(teacher_output): 1.0}
        if loss == "distill"
        else {loss: 1.0}
        if isinstance(loss, str)
        else loss
    )
    losses = {name: LOSSES[name](temperature) for name in names}

    def mixture(student: Any, teacher: Any, batch: Batch) -> Tensor:
        return torch.stack([names[name] * losses[name](student, teacher, batch) for name in names]).sum()

    return mixture


def needs_teacher(loss: str | dict[str, float]) -> bool:
    """Everything but the task loss does."""
    return names_of(loss) != {"task"}


def names_of(loss: str | dict[str, float]) -> set[str]:
    """Those that a loss is made of."""
    return {loss} if isinstance(loss, str) else set(loss)


def _distill(output: Any) -> str:
    if isinstance(output, TopLogits) or _find(output, ("logits",)) is not None:
        return "logits-kl"
    if _find(output, _HIDDEN) is not None:
        return "hidden-mse"
    if isinstance(output, Tensor) or _find(output, _EMBEDDING) is not None:
        return "embedding-mse"
    raise ValueError(
        f"distill: the model returns {_contents(output)}; it needs a tensor, or one of "
        f"{', '.join(('logits', *_HIDDEN, *_EMBEDDING))}"
    )


def _task(_: float) -> Loss:
    def loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
        del teacher, batch
        return _get(student, ("loss",))

    return loss


def _logits_kl(temperature: float) -> Loss:
    """T^2 KL(teacher || student), per token (Hinton et al. 2015, section 2)."""

    def loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
        log_p = F.log_softmax(logits_of(student).float() / temperature, dim=-1)
        if isinstance(teacher, TopLogits):
            return temperature**2 * _mean(teacher.divergence(log_p), batch)
        log_q = F.log_softmax(logits_of(teacher).float() / temperature, dim=-1)
        divergence = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
        return temperature**2 * _mean(divergence, batch)

    return loss


def _mse(names: tuple[str, ...]) -> Callable[[float], Loss]:
    def loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
        s, t = _get(student, names).float(), _get(teacher, names).float()
        return _mean((s - t).square().mean(dim=-1), batch) / _mean(t.square().mean(dim=-1), batch)

    return lambda _: loss


def _cosine(names: tuple[str, ...]) -> Callable[[float], Loss]:
    def loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
        s, t = _get(student, names).float(), _get(teacher, names).float()
        return _mean(1 - F.cosine_similarity(s, t, dim=-1), batch)

    return lambda _: loss


LOSSES: dict[str, Callable[[float], Loss]] = {
    "task": _task,
    "logits-kl": _logits_kl,
    "hidden-mse": _mse(_HIDDEN),
    "hidden-cosine": _cosine(_HIDDEN),
    "embedding-mse": _mse(_EMBEDDING),
    "embedding-cosine": _cosine(_EMBEDDING),
}


def logits_of(output: Any) -> Tensor:
    """What a model returned, if that is a tensor, or its logits.

    Raises:
        ValueError: there are none.
    """
    return _get(output, ("logits",))


def _mean(values: Tensor, batch: Batch) -> Tensor:
    """Over all positions but padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum()


def _find(output: Any, names: tuple[str, ...]) -> Tensor | None:
    found = (output.get(n) if isinstance(output, Mapping) else getattr(output, n, None) for n in names)
    return next((value for value in found if isinstance(value, Tensor)), None)


def _get(output: Any, names: tuple[str, ...]) -> Tensor:
    if isinstance(output, Tensor) and names != ("loss",):
        return output
    value = _find(output, names)
    if value is None:
        advice = (
            "give the batches labels, or choose loss: distill"
            if names == ("loss",)
            else "choose another loss"
        )
        raise ValueError(
            f"the loss needs {' or '.join(names)}; the model returns {_contents(output)}: {advice}"
        )
    return value


def _contents(output: Any) -> str:
    return ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
