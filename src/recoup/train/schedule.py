"""How a rate, or a weight, moves from step to step."""

import math
from collections.abc import Callable


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The share of the learning rate at a step: up on a line, then down to 0 on half a cosine.

    >>> [round(warmup_cosine(10, 2)(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return share


def rising(step: int, start: int, steps: int) -> float:
    """From 0 at the start to 1 at the last step, on half a cosine.

    >>> [round(rising(step, 2, 10), 2) for step in (2, 4, 6, 10)]
    [0.0, 0.15, 0.5, 1.0]
    """
    return 0.5 * (1 - math.cos(math.pi * (step - start) / (steps - start)))
