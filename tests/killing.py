"""Kills work wherever it touches the disk, to see what is lost.

`SIGKILL` leaves no time for anything, so where it strikes must be exact: the n-th time that the work renames,
removes or forces something to the disk, or comes to a point that it names itself. The work runs in a forked
child; this module belongs into a small process of its own (`server`), because a fork copies no threads.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[Path], None]
_POINTS = {os: ("rename", "replace", "fsync", "unlink"), shutil: ("rmtree",)}

passed = 0
fatal = 0


def point() -> None:
    """One more place where the work may be killed."""
    global passed
    passed += 1
    if passed == fatal:
        os.kill(os.getpid(), signal.SIGKILL)


def _at_points(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        point()
        return function(*args, **kwargs)

    return wrapped


def survives(work: Work, folder: Path, number: int) -> bool:
    """Do the work in a child that is killed at its n-th point; True if it ended before, and well."""
    global fatal, passed
    child = os.fork()
    if child == 0:
        fatal, passed = number, 0
        for module, names in _POINTS.items():
            for name in names:
                setattr(module, name, _at_points(getattr(module, name)))
        try:
            work(folder)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, status
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def killed_everywhere(
    work: Work, folder: Path, outcome: Callable[[Path], Any], every: int
) -> tuple[int, list[int]]:
    """How many points the work has, and those after which its repetition does not give the same.

    Args:
        work: is given a folder that is new, or as the kill left it.
        folder: for all of them.
        outcome: what the work left, to compare with that of a work that nobody killed.
        every: so many points lie between two kills.
    """
    whole = folder / "whole"
    work(whole)  # here, so that no child has to import anything
    gc.freeze()
    expected, lost, number = outcome(whole), list[int](), 1
    while True:
        here = folder / f"killed-{number}"
        if survives(work, here, number):
            return number, lost
        if not survives(work, here, 0) or outcome(here) != expected:
            lost.append(number)
        shutil.rmtree(here)
        number += every


def in_a_process(script: str, *arguments: str | Path) -> Any:
    """Run a module of the tests in a process of its own; what it prints last is JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", script, *map(str, arguments)],
        cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
