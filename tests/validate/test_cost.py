"""What two files cost: the runs take turns, and every figure belongs to its file."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup.validate.cost import compare_costs, compare_sizes

FLOAT, SMALL = Path("float"), Path("small")


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, list[str]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Running(nn.Module):
    def __init__(self, clock: Clock, folder: Path) -> None:
        super().__init__()
        self.clock, self.name, self.runs = clock, folder.name, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.clock.calls.append(self.name)
        self.runs += 1
        slow = self.runs <= 2 or self.runs == 5  # while it warms up, and once more
        self.clock.now += 100.0 if slow else {"float": 4.0, "small": 1.0}[self.name]
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ({"flag": True, "x": torch.zeros(8, 64), "y": torch.zeros(2)}, "8 x 64"),
        (torch.zeros(3, 2, 5), "3 x 2 x 5"),
        ((torch.zeros(7), torch.zeros(1)), "7"),
    ],
)
def test_each_file_gets_its_own_figures(batch: Any, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measured: list[tuple[Path, Any]] = []

    def peak(folder: Path, given: Any) -> int:
        measured.append((folder, given))
        return {FLOAT: 900, SMALL: 300}[folder]

    before, after = compare_costs(
        (FLOAT, SMALL),
        batch,
        load=lambda folder: Running(clock, folder),
        size_bytes=lambda folder: {FLOAT: 400, SMALL: 100}[folder],
        peak_bytes=peak,
        repeats=5,
    )
    assert (before.bytes, before.seconds, before.peak_bytes, before.batch) == (400, 4.0, 900, shape)
    assert (after.bytes, after.seconds, after.peak_bytes, after.batch) == (100, 1.0, 300, shape)
    assert [folder for folder, _ in measured] == [FLOAT, SMALL]
    assert all(given is batch for _, given in measured)
    assert clock.calls.count("float") == clock.calls.count("small") == 7
    turns = [tuple(clock.calls[i : i + 2]) for i in range(0, 14, 2)]
    assert turns[:2] == [("small", "float"), ("float", "small")]
    assert set(turns) == set(turns[:2])


def test_sizes_alone_are_a_cost_too() -> None:
    sizes = {FLOAT: 40_000_000, SMALL: 9_310_000}
    before, after = compare_sizes(
        (FLOAT, SMALL), torch.zeros(8, 64), size_bytes=sizes.__getitem__, unmeasured="no kernels here"
    )
    assert (before.bytes, after.bytes) == (40_000_000, 9_310_000)
    assert (after.seconds, after.peak_bytes, after.batch) == (None, None, "8 x 64")
    assert str(after) == "9.31 MB; speed and memory not measured: no kernels here"
