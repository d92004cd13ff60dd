"""The folder of a run: what is written, when, and whose it is.

recipe.yaml    the recipe with every default written out; the folder belongs to it
plan.json      which module got which scheme, and why the others did not
metrics.jsonl  one line for everything that was measured, as it was measured
report.md, report.html
run.json       the outcome; written last, so a folder with it is a finished run
artefact/      what ships
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recoup.schemes import Recipe

RECIPE, PLAN, METRICS, RUN = "recipe.yaml", "plan.json", "metrics.jsonl", "run.json"


class RunFolder:
    """A folder that belongs to one recipe.

    Args:
        path: is made where it does not exist; may hold an unfinished run of the same recipe, which is
            started again.
        recipe: of the run.

    Raises:
        ValueError: the folder holds something else, or a finished run; the artefact has no place.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path, recipe: Recipe) -> None:
        self.path = Path(path)
        self.start = time.monotonic()
        if finished(self.path, recipe) is not None:
            raise ValueError(f"{self.path}: this run is done; remove the folder to run it again")
        _claim(self.path, recipe)
        _write(self.path / RECIPE, recipe.dump())

    def record(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        line = {"event": event, "seconds": round(time.monotonic() - self.start, 3), **values}
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file; it is there whole, or not at all."""
        _write(self.path / name, json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n")


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
    if any(folder.iterdir()):
        theirs = folder / RECIPE
        if not theirs.is_file():
            raise ValueError(f"{folder}: is not empty and holds no run; choose another folder")
        if theirs.read_text(encoding="utf-8") != recipe.dump():
            raise ValueError(f"{folder}: holds a run of another recipe; choose another folder, or remove it")
    done = folder / RUN
    return json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None


def _claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder, or clear what an unfinished run of the same recipe left in it."""
    here, artefact = folder.resolve(), (folder / recipe.export.to).resolve()
    if here.is_relative_to(artefact):
        raise ValueError(f"export.to: {recipe.export.to!r} is where the run itself lies; name a folder in it")
    inside = artefact.is_relative_to(here)
    if not inside and artefact.exists() and (not artefact.is_dir() or any(artefact.iterdir())):
        raise ValueError(
            f"export.to: {artefact} exists and is not empty; choose another folder, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PLAN, METRICS, "report.md", "report.html"):
            (folder / name).unlink(missing_ok=True)
        if inside and artefact.is_dir():
            shutil.rmtree(artefact)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror}); choose another folder") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
