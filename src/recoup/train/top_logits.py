"""The few most likely classes of a teacher at every place, and how far a student is from them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """Log-probabilities of the k most likely classes, and of all others taken as one.

    Args:
        classes: (..., k).
        log_probabilities: (..., k), of these.
        log_rest: (...), of all others together; -inf where there are none.
    """

    classes: Tensor
    log_probabilities: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> "TopLogits":
        """Those of logits (..., classes); all classes where there are fewer than k.

        >>> TopLogits.of(torch.tensor([0.0, 2.0, 1.0]), 2, 1.0).classes
        tensor([1, 2], dtype=torch.int32)
        """
        log_probabilities = torch.log_softmax(logits.float() / temperature, dim=-1)
        top, classes = log_probabilities.topk(min(k, logits.shape[-1]), dim=-1)
        rest = _without(log_probabilities, classes)
        return cls(classes=classes.to(torch.int32), log_probabilities=top, log_rest=rest)

    def divergence(self, student: Tensor) -> Tensor:
        """KL(teacher || student) at every place, with all but the teacher's classes taken as one.

        It is at most that over all classes (the log sum inequality), and the same where the rest is empty.

        Args:
            student: (..., classes), log-probabilities at the same temperature.
        """
        classes = self.classes.long()
        within = self.log_probabilities - student.gather(-1, classes)
        divergence = (self.log_probabilities.exp() * within).sum(dim=-1)
        if classes.shape[-1] == student.shape[-1]:
            return divergence
        return divergence + self.log_rest.exp() * (self.log_rest - _without(student, classes))


def _without(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """The logarithm of what all but these classes have together."""
    return log_probabilities.scatter(-1, classes, -torch.inf).logsumexp(dim=-1)
