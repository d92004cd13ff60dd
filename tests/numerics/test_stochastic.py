"""Stochastic rounding: a draw is one of two neighbours, and the mean of draws is what was rounded.

Gradients at drawn codes are in `test_gradients.py`, those of the kernels in `test_kernels.py`.
"""

import numpy as np
import pytest
import torch

from recoup.numerics import (
    E4M3,
    ElementFormat,
    IntFormat,
    QParams,
    QuantSpec,
    drawn,
    fake_quantize,
    per_channel,
    per_tensor,
    quantize,
)
from recoup.numerics.quantize import position, qparams_of, shift_up

from .tables import CODED, FIXED, INTS, LEVELS, SPECS, numbers_of, over, sample


@over("spec", SPECS)
def test_a_draw_is_a_neighbour_and_what_lies_outside_stays(spec: QuantSpec) -> None:
    x = sample()
    qparams = qparams_of(x / 1.7, spec)
    moved = drawn(x, qparams, spec, 1)
    numbers = numbers_of(spec.format).numpy()
    places = shift_up(position(x, qparams, spec), qparams).reshape(x.shape).numpy()
    inside = (places >= numbers[0]) & (places <= numbers[-1])
    assert inside.any()
    assert torch.equal(moved[~torch.tensor(inside)], x[~torch.tensor(inside)])
    found = spec.format.decode(quantize(moved, qparams, spec)).numpy()
    above = np.searchsorted(numbers, places[inside])  # the first number that is not below
    lower, upper = numbers[np.maximum(above - 1, 0)], numbers[above]
    on_it = places[inside] == upper
    assert (found[inside][on_it] == upper[on_it]).all()
    assert ((found[inside] == lower) | (found[inside] == upper)).all()


FORMATS = [*INTS, *FIXED, *LEVELS, *(row.grid for row in CODED)]
SHARE, COUNT = 0.3, 4096


@over("grid", FORMATS)
def test_the_mean_of_draws_is_what_was_rounded(grid: ElementFormat) -> None:
    numbers = numbers_of(grid)
    zero_point = None if grid.lo < 0 else torch.full((len(numbers) - 1, 1), 3, dtype=torch.int32)
    rule = "narrow" if zero_point is None else "affine"
    spec = QuantSpec(format=grid, granularity=per_channel, scale_rule=rule, ranges="static")
    qparams = QParams(scale=torch.full((len(numbers) - 1, 1), 0.5), zero_point=zero_point)
    gaps = numbers.diff()[:, None]
    places = numbers[:-1, None] + SHARE * gaps - (0 if zero_point is None else zero_point)
    found = drawn((places * 0.5).expand(-1, COUNT), qparams, spec, 0).mean(dim=1, keepdim=True)
    # The upper one is drawn COUNT times with probability 0.3; six standard deviations of its share.
    deviation = 6 * (SHARE * (1 - SHARE) / COUNT) ** 0.5 * 0.5 * gaps
    assert ((found - places * 0.5).abs() <= deviation).all()


def test_a_seed_settles_the_draws() -> None:
    spec = QuantSpec(format=IntFormat(4), granularity=per_channel, scale_rule="narrow", ranges="static")
    x = torch.randn(8, 64)
    first, again, other = (drawn(x, qparams_of(x, spec), spec, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    drawn(x, qparams_of(x, spec), spec, 1)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was drawn from"


@pytest.mark.parametrize("grid", [IntFormat(4), E4M3], ids=lambda grid: grid.name)
def test_straight_through_is_asked_of_the_draw_and_nan_stays(grid: ElementFormat) -> None:
    spec = QuantSpec(format=grid, granularity=per_tensor, scale_rule="narrow", ranges="static")
    hi = grid.hi
    x = torch.tensor([[0.3 * hi, 1.01 * hi, 2 * hi, -3 * hi, torch.nan]], requires_grad=True)
    qparams = QParams(scale=torch.ones(1, 1))
    moved = drawn(x, qparams, spec, 0)
    y = fake_quantize(x, qparams, spec, moved)
    y.sum().backward()
    assert y[0, 1:4].tolist() == [hi, hi, grid.lo]
    assert bool(y[0, 4].isnan())
    assert x.grad is not None
    assert x.grad[0, :4].tolist() == [1.0, 1.0, 0.0, 0.0]  # 1.01 hi rounds to hi, as ever
