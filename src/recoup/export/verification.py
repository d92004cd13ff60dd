"""What is said of a folder: one check for every claim, and a verdict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recoup.export.float_model import Distance
from recoup.export.parity import Parity

Outcome = Literal["same", "different", "measured", "not checked"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim about a folder.

    Args:
        what: was compared.
        outcome: "measured" is a figure that nothing says should be another.
        found: what was seen, or why it could not be looked at; names tensors, modules or files.
    """

    what: str
    outcome: Outcome
    found: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What became of every claim about a folder.

    Args:
        folder: that was verified.
        written: for what and by what.
        checks: in the order in which they were made.
        parity: the figures of the engine; None where it was not run, or differs.
        distance: from the float model; None where none was given.
    """

    folder: Path
    written: str
    checks: tuple[Check, ...]
    parity: Parity | None = None
    distance: Distance | None = None

    @property
    def same(self) -> bool:
        """Nothing that was checked is different."""
        return all(check.outcome != "different" for check in self.checks)

    def __str__(self) -> str:
        rows = [f"{check.what:<11}{check.outcome:<13}{check.found}" for check in self.checks]
        return "\n".join([f"{self.folder}: {self.written}", *rows, f"{self.folder} is {self._verdict()}"])

    def _verdict(self) -> str:
        if not self.same:
            return "NOT what it should be"
        if any(check.outcome == "same" for check in self.checks):
            return "what was exported"
        if self.distance is not None:
            return "a quantization of that model"
        return "readable; what was exported is not known"


def not_checked(what: str, why: str) -> Check:
    """A claim that could not be looked at."""
    return Check(what=what, outcome="not checked", found=why)
