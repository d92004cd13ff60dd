"""When a model that trains is asked for symptoms, who is told, and what is kept of the answers."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from recoup.nn import Batch, device_of, moved
from recoup.validate.looks import Look, looks
from recoup.validate.symptoms import Symptom, of_an_evaluation, of_tensors, unchanged

_log = logging.getLogger("recoup")
_LINES = 3  # of one examination


class Examination:
    """Compares a model with what it was at the start of its training; see `validate.symptoms`.

    Args:
        model: at the start. Of each weight about 16,000 values are kept, and of learned scales all.
        batch: what inputs are looked at with, always the same; None for weights alone.
        begun: so many steps were made before.
        steps: to be made in all.
        warmup: while the learning rate rises, nothing says that too little changes.
        tells: another process does, where False.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch | None,
        *,
        steps: int,
        begun: int = 0,
        warmup: int = 0,
        tells: bool = True,
    ) -> None:
        self.model, self.batch = model, batch
        self.begun, self.steps, self.warmup, self.tells = begun, steps, warmup, tells
        self.start = self._looks()
        self.found: dict[tuple[str, str], Symptom] = {}

    @property
    def symptoms(self) -> list[Symptom]:
        """All that were seen, in the order in which they appeared."""
        return list(self.found.values())

    def tensors(self, step: int) -> None:
        """Look at quantized tensors after a step."""
        now = self._looks()
        found = list(of_tensors(self.start, now))
        made, left = step - self.begun, self.steps - self.begun
        still = unchanged(self.start, now, made, left) if step > max(self.warmup, self.begun) else None
        self.tell(step, found if still is None else [still, *found])

    def evaluation(self, step: int) -> None:
        """Look at the model's modes and switches, as they are while it is evaluated."""
        self.tell(step, of_an_evaluation(self.model))

    def tell(self, step: int, symptoms: Iterable[Symptom]) -> None:
        """Keep what was seen after a step, and log what was not seen before: a few lines, and a count."""
        new: list[Symptom] = []
        for symptom in symptoms:
            key = symptom.module, symptom.what
            known = self.found.get(key)
            new += [] if known else [symptom]
            self.found[key] = replace(symptom, first=known.first if known else step, last=step)
        if not self.tells:
            return
        for symptom in new[:_LINES]:
            _log.warning("step %d: %s", step, symptom)
        if len(new) > _LINES:
            _log.warning("step %d: %d more symptoms, as in the report", step, len(new) - _LINES)

    def facts(self) -> list[dict[str, Any]]:
        """What was seen, as plain data."""
        return [asdict(symptom) for symptom in self.symptoms]

    def resume(self, facts: Iterable[dict[str, Any]]) -> None:
        """Go on where `facts` were asked."""
        self.found = {(fact["module"], fact["what"]): Symptom(**fact) for fact in facts}

    def _looks(self) -> Mapping[str, Look]:
        batch = None if self.batch is None else moved(self.batch, device_of(self.model))
        return looks(self.model, batch)
