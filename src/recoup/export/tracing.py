"""What every target that traces a model asks of a batch and of the outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, call, size_of


@torch.no_grad()
def output_names(model: nn.Module, example: Batch, target: str) -> list[str]:
    """The names of a model's outputs; [""] for a model that returns one bare tensor.

    Raises:
        ValueError: an output is not a tensor.
    """
    result = call(model, example)
    if isinstance(result, Tensor):
        return [""]
    named: Mapping[str, Any] = {"": result}
    if isinstance(result, Mapping):
        named = result
    elif isinstance(result, (list, tuple)):
        named = {str(index): value for index, value in enumerate(result)}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{target}: output {name!r} is a {type(value).__name__}; a file has only tensors as outputs, "
                "so the model must return nothing else (no cache: model.config.use_cache = False)"
            )
    return list(named)


def free_axes(value: Any) -> dict[int, Any] | None:
    """The batch axis, and the lengths of sequences; an image's height and width are part of its model."""
    if not isinstance(value, Tensor):
        return None
    axes = range(value.ndim) if value.ndim < 4 else [0]
    return dict.fromkeys(axes, torch.export.Dim.AUTO)


def first_two(batch: Batch) -> Batch:
    """Two samples: a batch of one would be traced as a constant."""
    size = size_of(batch)

    def two(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            return value
        return value[:2] if size > 1 else torch.cat([value, value])

    if isinstance(batch, Mapping):
        return {name: two(value) for name, value in batch.items()}
    return two(batch) if isinstance(batch, Tensor) else tuple(map(two, batch))


def positional(batch: Batch) -> tuple[Any, ...]:
    """A batch that is no mapping, as the arguments of a call."""
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)
