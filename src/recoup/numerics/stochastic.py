"""Stochastic rounding: a draw decides which of its two neighbours on the grid a value becomes.

Rounded to nearest, an update below half a step between codes changes nothing. Drawn, it changes how often the
next code is seen, so that codes have the mean of what they stand for (Gupta et al. 2015, arXiv:1502.02551,
section 3.1).
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from recoup.numerics.formats import Format
from recoup.numerics.granularity import cut
from recoup.numerics.quantize import position, restored, shift_down, shift_up
from recoup.numerics.spec import QParams, QuantSpec


def drawn(x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec, seed: int) -> Float[Tensor, "r c"]:
    """x, moved onto one of the two values of the lattice around it, in float32: `quantize` gives its code.

    It is the upper one with the probability that x's place between both says, so the mean over seeds is x.
    What lies outside of the grid stays where it is, to saturate as ever; NaN stays NaN. There is no gradient:
    see `fake_quantize`.

    Args:
        x: what is rounded.
        qparams: with which.
        spec: the lattice.
        seed: with the shape and the device of x, it settles every draw.

    >>> from recoup.numerics import IntFormat, per_tensor
    >>> spec = QuantSpec(format=IntFormat(4), granularity=per_tensor, scale_rule="narrow", ranges="static")
    >>> qparams = QParams(scale=torch.tensor([[0.5]]))
    >>> found = drawn(torch.full((1, 10_000), 1.125), qparams, spec, seed=0)
    >>> found.unique(), f"{found.mean():.2f}"
    (tensor([1.0000, 1.5000]), '1.12')
    """
    x = x.detach()
    places = shift_up(position(x, qparams, spec), qparams).contiguous()
    grid = torch.tensor(_grid(spec.format), device=x.device)
    below = torch.bucketize(places, grid[1:-1], right=True)
    lower, upper = grid[below], grid[below + 1]
    numbers = torch.rand(places.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
    chosen = torch.where(numbers < (places - lower) / (upper - lower), upper, lower)
    inside = (places >= grid[0]) & (places <= grid[-1])
    moved = torch.where(
        inside, restored(shift_down(chosen, qparams), qparams), cut(x.float(), spec.granularity)
    )
    return moved.reshape(x.shape)


@cache
def _grid(grid: Format) -> list[float]:
    """All values, ascending."""
    first = -(2 ** (grid.bits - 1)) if grid.code_dtype == torch.int8 else 0
    values = grid.decode(torch.arange(first, first + 2**grid.bits).to(grid.code_dtype))
    return values[(values >= grid.lo) & (values <= grid.hi)].unique().tolist()
