"""A task that a user writes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recoup.tasks import Task, load

from .conftest import recipe

CODE = """
import torch
from recoup.tasks import Task

def parts(rows=8, batches=4):
    data = [{"x": torch.full((rows, 2), float(i)), "scale": torch.tensor(1.0)} for i in range(batches)]
    model = torch.nn.Linear(2, 2)
    return {"model": model, "calibration": data, "evaluate": lambda model: {"accuracy": [1, 0]}}

def with_train():
    return parts() | {"train": [{"x": torch.zeros(1, 2)}]}

def whole_task():
    return Task(**with_train(), facts={"data": "mine"})

def as_tuple():
    return tuple(parts().values())

def forever():
    found = parts()
    found["calibration"] = ({"x": torch.zeros(8, 2)} for _ in iter(int, 1))
    return found

def number():
    return 3

def two():
    return {"model": torch.nn.Linear(2, 2), "evaluate": print}

def no_model():
    return parts() | {"model": 1}

def no_function():
    return parts() | {"evaluate": 1}

def no_batches():
    return parts() | {"calibration": 1}

def no_tensors():
    return parts() | {"calibration": [[1, 2]]}

def a_scalar():
    return parts() | {"calibration": [{"x": torch.tensor(1.0)}]}
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_task.py").write_text(CODE)
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)


def loaded(folder: Path, entry: str, samples: int = 20, **arguments: Any) -> Task:
    return load(recipe({"name": "custom", "entry": entry, "arguments": arguments}, samples), folder)


def count(task: Task) -> int:
    return sum(len(batch["x"]) for batch in task.calibration)


@pytest.mark.parametrize("function", ["parts", "as_tuple", "forever"])
def test_parts_become_a_task(tmp_path: Path, function: str) -> None:
    task = loaded(tmp_path, f"my_task:{function}")
    assert count(task) == 20
    assert task.train == task.calibration
    assert task.facts["train"] == "the calibration batches: the entry gave no train"
    assert "sha256 my_task.py" in task.facts


def test_evaluate_gives_samples_and_scalars_are_not_cut(tmp_path: Path) -> None:
    task = loaded(tmp_path, "my_task:parts", samples=3)
    assert np.asarray(task.evaluate(task.model).values["accuracy"]).tolist() == [1, 0]
    assert task.calibration[0]["scale"].ndim == 0
    assert torch.equal(task.calibration[0]["x"], torch.zeros(3, 2))


@pytest.mark.parametrize("function", ["with_train", "whole_task"])
def test_train_is_kept(tmp_path: Path, function: str) -> None:
    task = loaded(tmp_path, f"my_task:{function}")
    assert (count(task), len(task.train)) == (20, 1)
    assert "train" not in task.facts
    assert task.facts.get("data") == ("mine" if function == "whole_task" else None)


def test_arguments_reach_the_function(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"calibration: 20 samples asked, 6 found in my_task:parts; give it more"
    ):
        loaded(tmp_path, "my_task:parts", rows=3, batches=2)


WRONG = {
    "my_task.parts": r"task: entry: 'my_task\.parts' is not \"module:function\"",
    "my_tusk:parts": r"task\.entry: no module 'my_tusk' in .* or among the installed packages",
    "my_tusk.inner:parts": r"task\.entry: no module 'my_tusk' in",
    "needs_more:parts": r"module 'needs_more' was found, but No module named 'not_installed_anywhere'",
    "my_task:prats": r"task\.entry: no function 'prats' in my_task; did you mean 'parts'",
    "my_task:torch": r"no function 'torch' in my_task; ",
    "my_task:number": r"my_task:number: returned int; return a recoup\.tasks\.Task, or a mapping or tuple",
    "my_task:two": r"my_task:two: returned model, evaluate; expected model, calibration, evaluate",
    "my_task:no_model": r"model is a int, expected a torch\.nn\.Module",
    "my_task:no_function": r"evaluate is a int, expected a function",
    "my_task:no_batches": r"calibration is a int, expected a list of batches",
    "my_task:no_tensors": r"calibration holds a list; a batch is a dict of tensors",
    "my_task:a_scalar": r"calibration holds a scalar; the first dimension of a batch is its samples",
}


@pytest.mark.parametrize(("entry", "message"), WRONG.items(), ids=WRONG)
def test_mistakes_are_one_line(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        loaded(tmp_path, entry)
    assert "\n" not in str(error.value)
