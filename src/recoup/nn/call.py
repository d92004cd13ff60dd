"""How a model is called: with which batch, and in which mode."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
DEFAULT_SAMPLES = 512  # that are looked at where nobody says how many


def call(model: nn.Module, batch: Batch) -> Any:
    """A mapping goes in by name, a list or tuple by position, anything else as the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    return model(batch)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {name: move(value) for name, value in batch.items()}
    return move(batch) if isinstance(batch, Tensor) else tuple(map(move, batch))


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Without dropout, and without batches that move running statistics; every module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def without_labels(batch: Batch) -> Batch:
    """The batch as a deployed model sees it, without the `labels` that transformers' losses take."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer lies; the CPU for a model that has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


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


def cut(batch: Batch, samples: int) -> Batch:
    """The first samples of a batch; what has no sample axis stays as it is.

    >>> import torch
    >>> cut({"input_ids": torch.zeros(8, 64), "use_cache": False}, 2)["input_ids"].shape
    torch.Size([2, 64])
    """
    size = size_of(batch)

    def first(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return value[:samples] if whole else value

    if isinstance(batch, Mapping):
        return {name: first(value) for name, value in batch.items()}
    return first(batch) if isinstance(batch, Tensor) else tuple(map(first, batch))


def take(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches until they hold `samples` samples; a larger last one is kept whole."""
    found = 0
    for batch in batches:
        yield batch
        found += size_of(batch)
        if found >= samples:
            return
