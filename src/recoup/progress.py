"""Progress on stderr for whatever takes longer than two seconds, shown only where somebody is watching."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


@contextmanager
def progress(description: str, total: int, *, shown: bool = True) -> Generator[Callable[[str], None]]:
    """A bar that goes away at the end. Call what it gives after every step, with a description.

    Args:
        description: in front of the bar.
        total: how many steps there are.
        shown: False on all processes but one.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def watched(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, with a bar.

    >>> list(watched([1, 2], "counting"))
    [1, 2]
    """
    with progress(description, len(items)) as advance:
        for item in items:
            yield item
            advance(description)


@contextmanager
def busy(description: str) -> Generator[None]:
    """A sign of life for one step of unknown length."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield
