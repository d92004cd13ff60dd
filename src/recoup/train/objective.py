"""The objective of a batch: what the student returns, what the teacher returns, and their distance."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, NonFiniteError, call, moved
from recoup.schemes.training import TrainSettings
from recoup.train.losses import build_loss
from recoup.train.teacher import Teacher


class Objective:
    """Calls the student, and the teacher where the loss needs one, and compares them.

    Args:
        settings: loss, temperature and precision.
        teacher: is asked what it says to a batch; None if the loss needs none.
        device: where student and teacher run.
        first: one batch, to see what the teacher returns.
    """

    def __init__(
        self, settings: TrainSettings, teacher: Teacher | None, device: torch.device, first: Batch
    ) -> None:
        self.device = device
        self.bf16 = settings.precision == "bf16"
        self.teacher = teacher
        self.loss = build_loss(settings.loss, settings.temperature, self._taught(moved(first, device)))

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar with a gradient."""
        batch = moved(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(call(student, batch), self._taught(batch), batch)

    @torch.no_grad()
    def mean(self, student: nn.Module, batches: Sequence[Batch]) -> float:
        """The mean loss of batches that nobody trains on, in eval mode; infinity where it is not finite."""
        modes = {module: module.training for module in student.modules()}
        student.eval()
        try:
            value = sum(float(self(student, batch)) for batch in batches) / len(batches)
        except NonFiniteError:
            value = math.inf
        for module, mode in modes.items():
            module.training = mode
        return value if math.isfinite(value) else math.inf

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Any:
        return None if self.teacher is None else self.teacher(batch)
