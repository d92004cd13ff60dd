"""Batches that go through a model as one, so that a layer sees all of them before the next one sees any."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, FakeQuantizer, size_of, without_labels


def check_batches(batches: Sequence[Batch], asked: str) -> None:
    """Can they go through a model as one batch?

    Args:
        batches: with labels or without.
        asked: what wants them so, for the message.

    Raises:
        ValueError: there are none, or they have several shapes.
    """
    if not batches:
        raise ValueError(f"{asked}: no batches")
    if len({_shape(without_labels(batch)) for batch in batches}) > 1:
        raise ValueError(
            f"{asked}: the calibration batches have different shapes, and go through the model as one; pack "
            "or pad them alike"
        )


def check_ready(model: nn.Module, taken: Sequence[Batch], samples: int | None, asked: str, call: str) -> None:
    """Are there as many samples as asked, and is every range known?

    Raises:
        ValueError: one of both is not so.
    """
    if (found := sum(map(size_of, taken))) < (samples or 1):
        raise ValueError(
            f"{asked}: {samples or 1} samples asked, {found} found; bring more, or ask for fewer"
        )
    for quantizer in (module for module in model.modules() if isinstance(module, FakeQuantizer)):
        if not quantizer.calibrated:
            raise ValueError(
                f"{quantizer.path}: its range is not known; run recoup.calibrate(model, batches) before "
                f"{call}"
            )


def as_one(batches: Sequence[Any]) -> Batch:
    """All of them, one after the other; what is no tensor is the first one's."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {str(name): _joined([batch[name] for batch in batches]) for name in first}
    if isinstance(first, Tensor):
        return _joined(batches)
    return tuple(_joined(values) for values in zip(*batches, strict=True))


def _joined(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


def _shape(batch: Any) -> Any:
    """Of everything but the samples."""
    positional = [batch] if isinstance(batch, Tensor) else batch
    parts: Any = batch.items() if isinstance(batch, Mapping) else enumerate(positional)
    return tuple((key, value.shape[1:] if isinstance(value, Tensor) else None) for key, value in parts)
