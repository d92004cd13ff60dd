"""Inputs at which two readings of one definition come apart: edges of binades, ties, and one ulp beside them.

Oracles and traps draw from here, so that "every code point" means the same everywhere.
"""

import numpy as np
import torch
from torch import Tensor

from recoup.numerics import ElementFormat

from .tables import around, numbers_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ULP = 2.0**-23


def mantissas(dtype: torch.dtype = torch.float32) -> Tensor:
    """The thresholds of all MX rules and one and two ulps to each side, in [1, 2); ascending."""
    thresholds = np.array([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 2.0])
    ulp = torch.finfo(dtype).eps
    near = np.unique(thresholds[:, None] + ulp * np.arange(-2, 3))
    return torch.tensor(near[(near >= 1) & (near < 2)], dtype=torch.float32)


def points(grid: ElementFormat) -> Tensor:
    """Every value of a format, every midpoint, and one float32 ulp to both sides of each."""
    numbers = numbers_of(grid).numpy()
    return torch.tensor(around(numbers))


def blocks(grid: ElementFormat, size: int, exponents: tuple[int, ...] = (-20, 0, 13)) -> Tensor:
    """Blocks whose largest magnitudes are at the edges of binades, filled with every code point.

    A row is a block: its first value is m * 2^(e + k), where 2^e is the power of two of the format's largest
    value, and the others are points that are no larger, times 2^k.
    """
    every = points(grid)
    binade = 2.0 ** np.floor(np.log2(grid.hi))
    rows: list[Tensor] = []
    for top in (mantissas() * binade).tolist():
        inside = every[every.abs() <= top]
        inside = torch.cat([inside, inside.new_zeros(-len(inside) % (size - 1))]).reshape(-1, size - 1)
        rows.append(torch.cat([torch.full((len(inside), 1), top), inside], dim=1))
    whole = torch.cat(rows)
    return torch.cat([whole * 2.0**k for k in exponents])


def drawn(dtype: torch.dtype, rows: int = 64, columns: int = 256) -> Tensor:
    """Random values with an outlier here and there and rows of very different size; on the dtype's grid."""
    x = torch.randn(rows, columns) * 2.0 ** torch.randint(-6, 7, (rows, 1))
    x[::7, ::31] *= 40
    x[5, : columns // 2] *= 1e-3
    return x.to(dtype)
