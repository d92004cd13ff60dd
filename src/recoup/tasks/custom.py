"""A task of your own: a function that gives the model, the batches and `evaluate`.

    task: {name: custom, entry: "my_module:my_function", arguments: {path: data/}}

The function returns a `recoup.tasks.Task`, a mapping, or a tuple in this order: model, calibration
(batches, each a dict of tensors), evaluate, and optionally train (batches). Without train, training sees
the calibration batches, and the facts of the task say so.
"""

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from recoup.schemes import Recipe, parse
from recoup.tasks.task import Batch, Task, sha256_of, too_few
from recoup.validate import Samples

PARTS = ("model", "calibration", "evaluate", "train")


class Settings(BaseModel):
    """Which function, and with which keyword arguments it is called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("entry")
    @classmethod
    def _module_and_function(cls, entry: str) -> str:
        if not re.fullmatch(r"[\w.]+:\w+", entry):
            raise ValueError(f'{entry!r} is not "module:function"')
        return entry


def load(recipe: Recipe, folder: Path) -> Task:
    """The task that the user's function returns; `folder` is put on `sys.path` for it.

    Raises:
        ValueError: no such module or function, a result that is not a task, or too few calibration samples.
    """
    assert recipe.task is not None
    settings = parse(Settings, recipe.task.settings, "task")
    module, function = entry_point(settings.entry, folder, "task.entry")
    result = function(**settings.arguments)
    facts = {"entry": settings.entry}
    if module.__file__ is not None:
        facts[f"sha256 {Path(module.__file__).name}"] = sha256_of(Path(module.__file__))
    parts = _parts(result, settings.entry)
    calibration = _cut(parts["calibration"], recipe.calibration.samples, settings.entry)
    facts["calibration samples"] = str(recipe.calibration.samples)
    if parts["train"] is None:
        facts["train"] = "the calibration batches: the entry gave no train"
        train = calibration
    else:
        train = [_batch(batch, f"{settings.entry}: train") for batch in parts["train"]]
    if isinstance(result, Task):
        return dataclasses.replace(result, calibration=calibration, facts=facts | result.facts)
    evaluate = parts["evaluate"]
    return Task(
        model=parts["model"],
        calibration=calibration,
        train=train,
        evaluate=lambda model: Samples.of(evaluate(model)),
        facts=facts,
    )


def entry_point(entry: str, folder: Path, key: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module and the function of "module:function"; `folder` is put on `sys.path` for them.

    Raises:
        ValueError: no such module or function; the message begins with `key`.
    """
    module_name, _, function_name = entry.partition(":")
    module = _import(module_name, folder.resolve(), key)
    return module, _function(module, function_name, key)


def _import(name: str, folder: Path, key: str) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # and left there: the function may import more when it is called
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{key}: module {name!r} was found, but {error}") from error
        raise ValueError(
            f"{key}: no module {error.name!r} in {folder} or among the installed packages"
        ) from None


def _function(module: ModuleType, name: str, key: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        legal = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        nearest = get_close_matches(name, legal, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(legal) or 'none'}"
        raise ValueError(f"{key}: no function {name!r} in {module.__name__}; {hint}")
    return function


def _parts(result: Any, entry: str) -> dict[str, Any]:
    """The four parts of whatever the function returned, checked; None for a train that is not there."""
    if isinstance(result, Task):
        found: dict[str, Any] = {name: getattr(result, name) for name in PARTS}
    elif isinstance(result, Mapping):
        found = {str(name): part for name, part in result.items()}
    elif isinstance(result, tuple) and len(result) in (3, 4):
        found = dict(zip(PARTS, result, strict=False))
    else:
        raise ValueError(
            f"{entry}: returned {type(result).__name__}; return a recoup.tasks.Task, or a mapping or tuple "
            "of model, calibration, evaluate and optionally train"
        )
    wrong = [*(set(PARTS[:3]) - set(found)), *(set(found) - set(PARTS))]
    if wrong:
        raise ValueError(
            f"{entry}: returned {', '.join(found) or 'nothing'}; "
            "expected model, calibration, evaluate and optionally train"
        )
    if not isinstance(found["model"], nn.Module):
        raise ValueError(f"{entry}: model is a {type(found['model']).__name__}, expected a torch.nn.Module")
    if not callable(found["evaluate"]):
        raise ValueError(f"{entry}: evaluate is a {type(found['evaluate']).__name__}, expected a function")
    for name in ("calibration", "train"):
        if not isinstance(found.setdefault(name, None), Iterable) and (name, found[name]) != ("train", None):
            raise ValueError(f"{entry}: {name} is a {type(found[name]).__name__}, expected a list of batches")
    return found


def _batch(batch: Any, where: str) -> Batch:
    tensors = dict(batch) if isinstance(batch, Mapping) else {}
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{where} holds a {type(batch).__name__}; a batch is a dict of tensors, one per argument"
        )
    return tensors


def _cut(batches: Iterable[Any], samples: int, entry: str) -> list[Batch]:
    """The first `samples` samples; a sample is a row of the first tensor of its batch."""
    kept: list[Batch] = []
    missing = samples
    for batch in (_batch(batch, f"{entry}: calibration") for batch in batches):
        first = next(iter(batch.values()))
        if first.ndim == 0:
            raise ValueError(
                f"{entry}: calibration holds a scalar; the first dimension of a batch is its samples"
            )
        rows = len(first)
        if rows > missing:
            batch = {
                name: tensor[:missing] if tensor.ndim and len(tensor) == rows else tensor
                for name, tensor in batch.items()
            }
        kept.append(batch)
        missing -= min(rows, missing)
        if not missing:
            return kept
    raise too_few(samples, samples - missing, entry)
