"""The folder of a run: what is written, when, and whose it is.

recipe.yaml    the recipe with every default written out; the folder belongs to it
plan.json      which module got which scheme, and why the others did not
metrics.jsonl  one line for everything that was measured, as it was measured
unfinished/    what a run that was stopped goes on from; gone when it is finished
    steps/         after every step: what is finished, and what the best rung made of the model
    training/      the checkpoints of a training that is under way
    float/         the float model in the target's format
    seconds        what the run had taken when it last went on, with the step that was not finished
report.md, report.html
run.json       the outcome; written last, so a folder with it is a finished run
artefact/      what ships
"""

import glob
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from recoup.ladder.standing import Part, Standing, rungs_of
from recoup.schemes import Recipe
from recoup.train.checkpoints import Checkpoints
from recoup.train.snapshot import to_disk

RECIPE, PLAN, METRICS, RUN = "recipe.yaml", "plan.json", "metrics.jsonl", "run.json"
_WORK, _DRAFT, _SECONDS = "unfinished", ".unfinished", "seconds"
_OURS = (RECIPE, PLAN, METRICS, RUN, _WORK, "report.md", "report.html")


class RunFolder:
    """A folder that belongs to one recipe, one model and its data; and how far the run in it has come.

    Args:
        path: is made where it does not exist; may hold an unfinished run of the same recipe, which goes on.
        recipe: of the run.
        identity: checksums of model and data.

    Raises:
        ValueError: the folder holds something else, or a finished run, or one that was begun with another
            model or other data; the artefact has no place.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path, recipe: Recipe, identity: Mapping[str, str]) -> None:
        self.path, self.artefact = Path(path), Path(path) / recipe.export.to
        if finished(self.path, recipe) is not None:
            raise ValueError(f"{self.path}: this run is done; remove the folder to run it again")
        self.steps = Checkpoints(self.path / _WORK / "steps", identity)
        parts, facts = self.steps.newest() or ({}, None)
        self.standing = _standing(facts, self.artefact)
        self.baseline: Mapping[str, Tensor] = parts.get("baseline", {})
        self.state: Mapping[str, Tensor] = parts.get("state", {})
        self.untrained: Mapping[str, Tensor] = parts.get("untrained", {})
        _check_place(self.path, recipe.export.to)
        self.start = time.monotonic() - (0.0 if facts is None else self._taken())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        write_text(self.path / RECIPE, recipe.dump())  # first: it says whose folder this is
        self._clear(everything=facts is None)

    @property
    def float_file(self) -> Path:
        """Where the float model lies in the target's format."""
        return self.path / _WORK / "float"

    @property
    def other_target(self) -> Path:
        """Where both files of another target lie while they are measured."""
        return self.path / _WORK / ".other"

    @property
    def training(self) -> Path:
        """Where a training that is under way keeps its checkpoints."""
        return self.path / _WORK / "training"

    @property
    def seconds(self) -> float:
        """What the run took, interruptions left out."""
        return time.monotonic() - self.start

    @property
    def seconds_of_step(self) -> float:
        """What the step under way took, with what was lost of it when it was stopped."""
        return self.seconds - self.standing.seconds

    def record(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        line = {"event": event, "seconds": round(self.seconds, 3), **values}
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def save(self) -> None:
        """End a step: what the standing says now is not done again.

        Raises:
            OSError: it cannot be written; what was saved before is still there.
        """
        self.standing.step += 1
        self.standing.seconds = self.seconds
        self.standing.lines = len(_lines(self.path / METRICS))
        parts = {"baseline": self.baseline, "state": self.state}
        if self.untrained:
            parts["untrained"] = self.untrained
        self.steps.save(self.standing.step, parts, {"standing": self.standing.to_json()})

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file; it is there whole, or not at all."""
        write_text(self.path / name, json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n")

    def finish(self, data: Mapping[str, Any]) -> None:
        """Write the outcome; then what the run would go on from is not needed any more."""
        self.write_json(RUN, data)
        shutil.rmtree(self.path / _WORK)

    def free_artefact(self) -> None:
        """Make room for an artefact; its place is in the folder of the run, which belongs to it."""
        if self.artefact.is_dir():
            shutil.rmtree(self.artefact)

    def _clear(self, *, everything: bool) -> None:
        """Remove what belongs to no finished step."""
        work = self.path / _WORK
        work.mkdir(parents=True, exist_ok=True)
        for draft in set(self._drafts()):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        for name in ("report.md", "report.html", *((PLAN, METRICS) if everything else ())):
            (self.path / name).unlink(missing_ok=True)
        if everything:
            (work / _SECONDS).unlink(missing_ok=True)
            for folder in (self.float_file, self.training):
                shutil.rmtree(folder, ignore_errors=True)
            self.free_artefact()
        else:  # before the lines that say so are dropped
            write_text(work / _SECONDS, f"{self.seconds}\n")
        write_text(self.path / METRICS, "".join(_lines(self.path / METRICS)[: self.standing.lines]))

    def _taken(self) -> float:
        """What the run had taken when it was stopped: as of the last step, line or beginning."""
        kept = self.path / _WORK / _SECONDS
        unfinished = _lines(self.path / METRICS)[self.standing.lines :]
        told = [json.loads(line)["seconds"] for line in unfinished if line.endswith("\n")]
        before = [float(kept.read_text("utf-8"))] if kept.is_file() else []
        return max([self.standing.seconds, *told, *before])

    def _drafts(self) -> Iterator[Path]:
        """What writers that were killed left; whatever else has a dot in front is somebody else's."""
        work = (f"{_WORK}/{name}" for name in (f".*{_DRAFT}", ".float", ".other"))
        mine = [f".*{_DRAFT}", *work, ".report.md.*", ".report.html.*"]
        for pattern in mine:
            yield from (path for path in self.path.glob(pattern) if not path.is_symlink())
        unproven = f".{glob.escape(self.artefact.name)}-{'?' * 8}"  # as `export` has it from tempfile
        yield from (path for path in self.artefact.parent.glob(unproven) if not path.is_symlink())


def begun(path: str | Path) -> bool:
    """Has a run in the folder a step to go on from?"""
    return any((Path(path) / _WORK / "steps").glob("step-*"))


def finished(path: str | Path, recipe: Recipe) -> dict[str, Any] | None:
    """The run.json of a finished run of this recipe; None where the folder has none.

    Raises:
        ValueError: the folder holds something else.
        OSError: it does not exist and cannot be made.
    """
    folder = Path(path)
    if not folder.exists():
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise OSError(f"{folder}: cannot be written ({parent} is no folder to write in); choose another")
        return None
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a run needs a folder")
    if any(not path.name.endswith(_DRAFT) for path in folder.iterdir()):
        theirs = folder / RECIPE
        if not theirs.is_file():
            raise ValueError(f"{folder}: is not empty and holds no run; choose another folder")
        if theirs.read_text(encoding="utf-8") != recipe.dump():
            raise ValueError(f"{folder}: holds a run of another recipe; choose another folder, or remove it")
    done = folder / RUN
    if done.is_file():  # a run that was killed while it cleaned up has this left
        shutil.rmtree(folder / _WORK, ignore_errors=True)
    return json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None


def outcome_of_part(path: str | Path, recipe: Recipe, part: Part | None) -> str | None:
    """The outcome of a run, or of a part of it, that is done; None where it can be done now.

    Loads no model, and changes nothing.

    Raises:
        ValueError: the folder holds something else, the recipe has nothing for this part, or what comes
            before it is not done.
        OSError: the folder does not exist and cannot be made.
    """
    rungs_of(part, recipe)
    done = finished(path, recipe)
    if done is not None or part is None:
        return None if done is None else done["outcome"]
    saved = Checkpoints(Path(path) / _WORK / "steps", {}, writes=False).newest()
    standing = _standing(None if saved is None else saved[1], Path(path) / recipe.export.to)
    if part in ("export", "validate") and standing.best is None:
        raise ValueError(f"{path}: no rung is measured yet; run recoup ptq or recoup qat first")
    if part == "validate" and standing.best is not None and standing.exported != standing.best.name:
        raise ValueError(f"{path}: rung {standing.best.name} is not exported yet; run recoup export first")
    return standing.outcome(part, recipe)


def write_text(file: Path, text: str) -> None:
    """Write a file; it is there whole, or not at all.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    draft = file.with_name(f".{file.name}{_DRAFT}")
    try:
        draft.write_text(text, encoding="utf-8")
        to_disk(draft)
        os.replace(draft, file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written ({error.strerror}); what was saved is kept") from None


def _standing(facts: Mapping[str, Any] | None, artefact: Path) -> Standing:
    """What was saved; an artefact that was moved away since is none."""
    standing = Standing() if facts is None else Standing.from_json(facts["standing"])
    if not artefact.is_dir():
        standing.drop_artefact()
    return standing


def _check_place(folder: Path, to: str) -> None:
    """A recipe writes into the folder of its run, links or not, and there where nothing else is written."""
    first = Path(to).parts[0]
    if first in _OURS or first.startswith("."):
        raise ValueError(f"export.to: {to!r} is where the run itself lies; name another folder, as artefact")
    here, there = folder.resolve(), (folder / to).resolve()
    if here not in there.parents:
        raise ValueError(f"export.to: {to!r} leads to {there}, out of the run's folder; remove the link")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
