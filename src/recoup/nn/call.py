"""How a model is called with a batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any] | Sequence[Any] | Tensor


def call(model: nn.Module, batch: Batch) -> Any:
    """A mapping goes in by name, a list or tuple by position, anything else as the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    return model(batch)


def size_of(batch: Batch) -> int:
    """The number of samples in a batch: the length of its first tensor's first axis.

    Raises:
        ValueError: it holds no tensor.

    >>> import torch
    >>> size_of({"input_ids": torch.zeros(8, 64)})
    8
    """
    values: Iterable[Any] = (
        (batch,) if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    )
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
    raise ValueError(
        f"a batch is a tensor, or a mapping or tuple with one in it; found {type(batch).__name__}"
    )
