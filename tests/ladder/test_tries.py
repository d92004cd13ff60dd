"""How re-tuning decides, without a model."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recoup import TrainSettings
from recoup.ladder.tries import (
    at_rate,
    expected_seconds,
    falls,
    found_rate,
    going_on,
    lowest,
    rates,
    shares_of_error,
    shortened,
    spent,
    successive_halving,
)
from recoup.schemes.training import BatchNormSettings
from recoup.validate.tries import Try

LOSSES = st.lists(st.floats(0, 100), min_size=1, max_size=20)


def tried(kind: Any, rate: float = 1e-3, steps: int = 8, **more: Any) -> Try:
    return Try(kind=kind, name="a", why="b", learning_rate=rate, steps=steps, **more)


def curve(**looks: float) -> list[dict[str, float]]:
    """Step -> held-out loss, as step_3=0.5; a step without a look is between each two."""
    entries = [{"step": float(name.removeprefix("step_")), "held_out": loss} for name, loss in looks.items()]
    return [found for entry in entries for found in (entry, {"step": entry["step"] + 1, "loss": 0.0})][:-1]


@given(LOSSES, st.integers(1, 400))
def test_halving_finds_the_best_where_a_short_training_tells_as_much_as_a_long_one(
    losses: list[float], budget: int
) -> None:
    found = successive_halving(range(len(losses)), budget, lambda one, _: losses[one])
    assert losses[found] == min(losses)
    assert found == losses.index(min(losses))  # the first of equals


@given(LOSSES, st.integers(1, 400))
def test_halving_gives_the_better_half_more_and_keeps_its_budget(losses: list[float], budget: int) -> None:
    asked: list[tuple[int, int]] = []

    def measure(one: int, share: int) -> float:
        asked.append((one, share))
        return losses[one]

    successive_halving(range(len(losses)), budget, measure)
    rounds, left, place = len(losses).bit_length() - 1, list(range(len(losses))), 0
    for _ in range(rounds):
        there = asked[place : place + len(left)]
        assert [one for one, _ in there] == left
        assert {share for _, share in there} == {max(1, budget // (len(left) * rounds))}
        assert sum(share for _, share in there) <= max(budget / rounds, len(left))
        place += len(left)
        left = sorted(left, key=lambda one: losses[one])[: len(left) // 2]
    assert place == len(asked)


@given(st.lists(st.floats(0, 9) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=9))
def test_what_diverges_loses_against_what_does_not(losses: list[float]) -> None:
    found = successive_halving(range(len(losses)), 99, lambda one, _: losses[one])
    assert math.isfinite(losses[found]) or not any(map(math.isfinite, losses))


def test_the_rates_lie_around_the_recipes_and_hold_it_as_it_is() -> None:
    assert rates(TrainSettings(learning_rate=1.234e-4)) == [
        3.9e-6, 1.2e-5, 3.9e-5, 1.234e-4, 3.9e-4, 1.2e-3, 3.9e-3, 1.2e-2,
    ]  # fmt: skip


def test_a_search_that_is_not_over_found_nothing() -> None:
    settings = TrainSettings(steps=80, learning_rate=1.0)
    tries: list[Try] = []
    for share, shares in ((5, rates(settings)), (10, [1.0, 3.2, 0.32, 10.0]), (20, [1.0, 3.2])):
        for rate in shares:
            assert found_rate(tries, settings) is None
            tries.append(tried("search", rate, share, held_out=abs(math.log10(rate / 1.2))))
    assert found_rate(tries, settings) == 1.0


def test_a_short_training_has_all_of_the_schedule() -> None:
    settings = TrainSettings(steps=80, warmup=20, start_step=10, freeze_ranges=60, early_stop=2)
    short = shortened(settings, 8)
    assert (short.steps, short.warmup, short.start_step, short.freeze_ranges) == (8, 2, 1, 6)
    assert (short.evaluate_every, short.early_stop) == (8, None)
    assert shortened(TrainSettings(steps=80), 8).freeze_ranges is None


def test_norms_freeze_at_the_same_share_and_stay_frozen() -> None:
    settings = TrainSettings(steps=80, batch_norm={"freeze": 40})
    assert shortened(settings, 8).batch_norm == BatchNormSettings(freeze=4)
    assert going_on(settings, ranges=True).batch_norm == BatchNormSettings(freeze=0)
    moving = TrainSettings(steps=80, batch_norm={})
    assert shortened(moving, 8).batch_norm == going_on(moving, ranges=True).batch_norm == BatchNormSettings()


def test_the_rate_of_scales_keeps_its_ratio() -> None:
    settings = TrainSettings(learning_rate=1e-3, scale_learning_rate=5e-4, budget=9.0)
    other = at_rate(settings, 1e-2)
    assert (other.learning_rate, other.budget) == (1e-2, None)
    assert other.scale_learning_rate == pytest.approx(5e-3)
    assert at_rate(TrainSettings(), 1e-2).scale_learning_rate is None


def test_going_on_delays_nothing_again() -> None:
    settings = TrainSettings(steps=80, start_step=10, freeze_ranges=60, progressive=(8, 4))
    found = [going_on(settings, ranges=ranges) for ranges in (True, False)]
    assert [(one.start_step, one.freeze_ranges) for one in found] == [(0, 60), (0, 0)]
    assert [one.progressive for one in found] == [(), ()]
    assert going_on(TrainSettings(), ranges=False).freeze_ranges is None


@pytest.mark.parametrize(
    ("looks", "still"),
    [
        ({"step_0": 1.0, "step_4": 0.8, "step_8": 0.6}, True),
        ({"step_0": 1.0, "step_8": 0.9}, True),
        ({"step_0": 1.0, "step_4": 0.8, "step_8": 0.81}, False),  # it rose
        ({"step_0": 1.0, "step_4": 0.8, "step_8": 0.79}, False),  # by 1.25 %: that is no fall
        ({"step_0": 1.0, "step_2": 0.8, "step_6": 0.7, "step_8": 0.699}, True),  # the rate is 0 at the end
        ({"step_0": 1.0, "step_8": math.inf}, False),
        ({"step_0": 1.0}, False),
        ({}, False),
    ],
)
def test_a_curve_falls_where_its_end_is_lower_than_its_first_half(
    looks: dict[str, float], still: bool
) -> None:
    assert falls(curve(**looks)) is still


def test_the_start_is_no_loss_of_a_training() -> None:
    assert lowest(curve(step_0=0.1, step_4=0.8, step_8=0.9)) == 0.8
    assert lowest(curve(step_0=0.1)) == math.inf
    assert lowest(curve(step_0=0.1, step_4=math.nan)) == math.inf


def test_a_training_is_expected_to_take_as_long_as_the_newest_of_its_length() -> None:
    recipe, short = tried("recipe", steps=100, seconds=50.0), tried("search", steps=4, seconds=4.0)
    assert expected_seconds([recipe, short], 80) == 40.0
    assert expected_seconds([recipe, short], 6) == 6.0
    assert expected_seconds([recipe, short, tried("rate", steps=100, seconds=90.0)], 100) == 90.0


def test_the_recipes_own_training_is_not_of_the_budget() -> None:
    tries = [tried("recipe", seconds=50.0), tried("search", seconds=4.0), tried("bits", seconds=3.0)]
    assert spent(tries) == 7.0


def test_shares_of_error_are_those_of_the_squares() -> None:
    assert shares_of_error({"a": 0.1, "b": 0.3, "c": math.inf}) == pytest.approx({"b": 0.9, "a": 0.1})
    assert list(shares_of_error({"a": 0.1, "b": 0.3})) == ["b", "a"]
    assert shares_of_error({"a": 0.0}) == {"a": 0.0}
