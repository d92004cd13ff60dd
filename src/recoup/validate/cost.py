"""What two files cost, next to each other: the float one and the quantized one, in the same engine."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, call
from recoup.validate.report import Cost

TIMED, WARM_UP = 11, 2  # runs of each file


def compare_costs(
    folders: tuple[Path, Path],
    batch: Batch,
    *,
    load: Callable[[Path], nn.Module],
    size_bytes: Callable[[Path], int],
    peak_bytes: Callable[[Path, Batch], int],
    repeats: int = TIMED,
) -> tuple[Cost, Cost]:
    """Size on disk, median latency and peak memory of two artefacts.

    The runs take turns, so that whatever else the machine does falls on both. Memory is that of a fresh
    process each.

    Args:
        folders: of the two artefacts.
        batch: what is run.
        load: folder -> a module that runs in the engine.
        size_bytes: folder -> bytes on disk.
        peak_bytes: (folder, batch) -> bytes of a fresh process.
        repeats: timed runs of each, after those that warm up.
    """
    models = [load(folder) for folder in folders]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + WARM_UP):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            call(models[which], batch)
            if turn >= WARM_UP:
                seconds[which].append(time.perf_counter() - start)
    first, second = (
        Cost(
            bytes=size_bytes(folder),
            seconds=statistics.median(times),
            peak_bytes=peak_bytes(folder, batch),
            batch=_shape(batch),
        )
        for folder, times in zip(folders, seconds, strict=True)
    )
    return first, second


def compare_sizes(
    folders: tuple[Path, Path], batch: Batch, *, size_bytes: Callable[[Path], int], unmeasured: str
) -> tuple[Cost, Cost]:
    """Size on disk of two artefacts whose engine here says nothing about speed and memory.

    Args:
        folders: of the two artefacts.
        batch: what would be run.
        size_bytes: folder -> bytes on disk.
        unmeasured: why there is no more, and what to do; see `Cost`.
    """
    first, second = (
        Cost(
            bytes=size_bytes(folder),
            seconds=None,
            peak_bytes=None,
            batch=_shape(batch),
            unmeasured=unmeasured,
        )
        for folder in folders
    )
    return first, second


def _shape(batch: Batch) -> str:
    values: list[Any] = (
        list(batch.values())
        if isinstance(batch, Mapping)
        else [batch]
        if isinstance(batch, Tensor)
        else list(batch)
    )
    shape = next(value.shape for value in values if isinstance(value, torch.Tensor))
    return " x ".join(map(str, shape))
