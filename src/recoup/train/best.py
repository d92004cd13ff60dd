"""The step with the lowest held-out loss: its weights, and how long ago it was."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recoup.nn import Batch
from recoup.schemes.training import TrainSettings
from recoup.train.objective import Objective
from recoup.train.snapshot import load_state_of, moving_state_of


class Best:
    """Looks at the held-out batches, and keeps what trained of the best step, on the CPU.

    The start counts as a step. Without held-out batches there is no best step, and the last one stays.

    Args:
        model: that is trained.
        objective: what is looked at.
        held_out: batches that nobody trains on.
        settings: `early_stop`, the looks without a lower loss after which training is over; those within
            `start_step` do not count, since nothing has trained what they look at.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, held_out: Sequence[Batch], settings: TrainSettings
    ) -> None:
        self.model, self.objective, self.held_out, self.settings = model, objective, held_out, settings
        self.step = 0
        self.value = math.inf
        self.looks_since = 0
        self.state: Mapping[str, Tensor] = {}

    @property
    def is_long_ago(self) -> bool:
        """So many looks found nothing better that training is over."""
        patience = self.settings.early_stop
        return patience is not None and self.looks_since >= patience

    def look(self, step: int) -> dict[str, float]:
        """The held-out loss after a step, as an entry of the record; the state is kept if it is the best."""
        if not self.held_out:
            return {}
        value = self.objective.mean(self.model, self.held_out)
        if step == 0 or value < self.value:
            self.step, self.value, self.looks_since = step, value, 0
            self.state = {k: v.detach().to("cpu", copy=True) for k, v in moving_state_of(self.model).items()}
        elif step > self.settings.start_step:
            self.looks_since += 1
        return {"held_out": value}

    def restore(self) -> None:
        """Give the model the weights of the best step."""
        if self.state:
            load_state_of(self.model, self.state)

    def facts(self) -> dict[str, Any]:
        """All but the weights, as plain data."""
        return {"step": self.step, "value": self.value, "looks_since": self.looks_since}

    def resume(self, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Go on where `facts` were asked, with the weights of that best step."""
        self.step, self.value, self.looks_since = facts["step"], facts["value"], facts["looks_since"]
        self.state = {name: tensor.clone() for name, tensor in state.items()}
