"""Ctrl-C that waits for the end of a step."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_waits() -> Generator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only answers True to "was it asked for?"; a second one interrupts at once.

    Leaves alone a handler that somebody else installed, and threads that get no signals: the answer is then
    always False.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
