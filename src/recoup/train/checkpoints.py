"""Checkpoints of long work: the newest whole one is where it goes on.

    step-000050/   tensors as safetensors; the rest, with checksums, as JSON

A checkpoint belongs to one piece of work: to its model, its data and whatever else its result follows from.
The last two are kept, so that a damaged one costs the steps since the one before, and no more.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from recoup.train.snapshot import DamagedError, Parts, clear_unfinished, read_snapshot, write_snapshot

KEPT = 2


class Checkpoints:
    """The checkpoints of one training, or of one run, in a folder of their own.

    Args:
        folder: is made with the first checkpoint.
        identity: what the result follows from: its name -> its fingerprint.
        writes: False in all processes but one.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, writes: bool = True) -> None:
        self.folder, self.identity, self.writes = folder, dict(identity), writes
        if writes:
            clear_unfinished(folder)

    def newest(self, *, quiet: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Parts and facts of the newest checkpoint that is whole; None where there is none.

        Warns of every damaged one that is newer, and says what is taken in its place.

        Args:
            quiet: another process warns.

        Raises:
            ValueError: the checkpoints are those of other work.
        """
        found = self._all()
        for index, path in reversed(list(enumerate(found))):
            try:
                parts, facts = read_snapshot(path)
            except DamagedError as error:
                instead = f"going on from {found[index - 1].name}" if index else "starting from the beginning"
                if not quiet:
                    warnings.warn(f"{error}; {instead}", stacklevel=1)  # one place, so it is said once
                continue
            self._check(facts["identity"])
            self._let_go(found[: index + 1])
            return parts, facts
        return None

    def save(self, step: int, parts: Parts, facts: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, and only then let go of those before the last two.

        Newer ones are damaged, or they would have been gone on from: they go too.

        Raises:
            OSError: it cannot be written; those before it are still there.
        """
        if not self.writes:
            return
        write_snapshot(
            self.folder / f"step-{step:06}", parts, {"identity": self.identity, "step": step, **facts}
        )
        found = self._all()
        newest = next(index for index, path in enumerate(found) if _step(path) == step)
        self._let_go(found[: newest + 1])
        for path in found[newest + 1 :]:
            shutil.rmtree(path)

    def _let_go(self, whole: list[Path]) -> None:
        for path in whole[:-KEPT] if self.writes else []:
            shutil.rmtree(path)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=_step)

    def _check(self, theirs: Mapping[str, Any]) -> None:
        other = [name for name, mine in self.identity.items() if theirs.get(name) != mine]
        if other:
            raise ValueError(
                f"{self.folder}: was begun with other {', '.join(other)}; go on with those, or choose "
                "another folder, or remove it"
            )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
