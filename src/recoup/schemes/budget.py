"""A budget of time: "30m", "2h", "90s", or seconds."""

import math
from typing import Any

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(value: Any) -> float | None:
    """The seconds of a budget; None where there is none.

    Raises:
        ValueError: it is no time, or not above 0.

    >>> seconds_of("30m"), seconds_of(90)
    (1800.0, 90.0)
    """
    if value is None:
        return None
    written = str(value).strip()
    number, unit = (written[:-1], written[-1]) if written[-1:] in _UNITS else (written, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{value!r} is no time above 0; write 30m, 2h, 90s, or a number of seconds")
    return seconds
