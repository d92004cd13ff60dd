"""How many elements of a 2-D view share one scale.

A module hands numerics a 2-D view of its tensor: a weight is (output features, input features), an
activation is (tokens, features). A granularity cuts that view into blocks of rows x columns, and every
block has one scale. So "per channel" for a weight and "per token" for an activation are one thing.
"""

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """The size of a block. None means the whole axis.

    Raises:
        ValueError: a size that is not positive.

    >>> Granularity(rows=1, columns=32).scale_shape(4, 64)
    (4, 2)
    """

    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for axis, size in (("rows", self.rows), ("columns", self.columns)):
            if size is not None and size < 1:
                raise ValueError(f"granularity: {size} {axis} asked; a block has at least one")

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a (rows, columns) view.

        Raises:
            ValueError: the blocks do not fill the view; the message names the sizes that do.
        """
        return (
            1 if self.rows is None else _count(rows, self.rows, "rows"),
            1 if self.columns is None else _count(columns, self.columns, "columns"),
        )

    def elements_per_scale(self, rows: int, columns: int) -> int:
        """How many elements one scale serves."""
        return (self.rows or rows) * (self.columns or columns)

    def __str__(self) -> str:
        match (self.rows, self.columns):
            case (None, None):
                return "tensor"
            case (1, None):
                return "row"
            case (1, columns):
                return f"g{columns}"
            case (rows, columns):
                return f"{rows or 'all'}x{columns or 'all'}"


def _count(length: int, size: int, axis: str) -> int:
    if length % size:
        sizes = divisors(length)
        others = f", or a group size among {sizes}" if sizes else ""
        raise ValueError(f"{length} {axis} cannot be cut into groups of {size}; use per_channel{others}")
    return length // size


def divisors(length: int) -> list[int]:
    """The group sizes that divide `length`, from 2 up.

    >>> divisors(12)
    [2, 3, 4, 6, 12]
    """
    return [size for size in range(2, length + 1) if length % size == 0]


per_tensor = Granularity(rows=None, columns=None)
per_channel = Granularity(rows=1, columns=None)
per_token = per_channel  # the rows of an activation are its tokens


def per_group(size: int) -> Granularity:
    """One scale for every `size` neighbours along the reduction axis."""
    return Granularity(rows=1, columns=size)


def per_block(rows: int, columns: int) -> Granularity:
    """One scale for every rows x columns tile."""
    return Granularity(rows=rows, columns=columns)


def cut(x: Shaped[Tensor, "r c"], granularity: Granularity) -> Shaped[Tensor, "br rows bc columns"]:
    """The view, cut into blocks: element (i, :, j, :) is the block of scale (i, j).

    Raises:
        ValueError: the blocks do not fill the view.
    """
    rows, columns = granularity.scale_shape(*x.shape)
    return x.reshape(rows, granularity.rows or x.shape[0], columns, granularity.columns or x.shape[1])


def spread(scale: Shaped[Tensor, "br bc"]) -> Shaped[Tensor, "br 1 bc 1"]:
    """Scales in the shape in which they broadcast against `cut`'s blocks."""
    return scale[:, None, :, None]


def extrema(
    x: Shaped[Tensor, "r c"], granularity: Granularity
) -> tuple[Shaped[Tensor, "br bc"], Shaped[Tensor, "br bc"]]:
    """The smallest and largest value of every block, in float32.

    >>> import torch
    >>> extrema(torch.tensor([[1.0, -2.0, 3.0, 0.5]]), per_group(2))
    (tensor([[-2.0000,  0.5000]]), tensor([[1., 3.]]))
    """
    blocks = cut(x, granularity)
    return blocks.amin(dim=(1, 3)).float(), blocks.amax(dim=(1, 3)).float()
