"""What re-tuning tried, as data: each training with its reason, its figures and its time."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["recipe", "search", "rate", "steps", "bits"]


@dataclass(frozen=True, kw_only=True)
class Try:
    """One training: the recipe's own, a short one of the search, or a whole one that gates are asked of.

    Args:
        kind: what it changes: nothing, the rate in a search or for good, the steps, or the bits of layers.
        name: of its rung; what was searched for.
        why: it is made.
        learning_rate: of the weights.
        steps: that it is to make; once made, those that it made.
        begun_from: the rung whose model it trains on; empty where it begins as the recipe's own did.
        raised: module -> its preset, of modules with more bits than the recipe gives them.
        held_out: the lowest held-out loss after its first step; infinite where there is none.
        falls: the held-out loss was still falling at its end.
        seconds: it took, interruptions left out.
        outcome: of its gates; None where none is asked.
        error: that ended it.
    """

    kind: Kind
    name: str
    why: str
    learning_rate: float
    steps: int
    begun_from: str = ""
    raised: dict[str, str] = field(default_factory=dict[str, str])
    held_out: float = float("inf")
    falls: bool = False
    seconds: float = 0.0
    outcome: str | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Retuned:
    """What came of a budget.

    Args:
        budget: in seconds.
        seconds: that were spent.
        tries: in the order in which they were made, the recipe's own training first.
        raised: module -> (preset in the recipe, preset in what is shipped), where they are not the same.
        advice: what would be worth more time; empty where the gates passed.
    """

    budget: float
    seconds: float
    tries: list[Try]
    raised: dict[str, tuple[str, str]]
    advice: list[str]
