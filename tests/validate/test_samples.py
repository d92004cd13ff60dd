import math

import numpy as np
import pytest

from recoup.validate import AGGREGATES, Samples


def test_every_metric_is_a_mean_except_those_that_say_otherwise():
    values = [0.5, 1.5, 4.0]
    assert Samples({"score": values}).aggregate("score") == 2.0
    assert Samples({"perplexity": values}).aggregate("perplexity") == pytest.approx(math.e**2)
    assert set(AGGREGATES) == {"perplexity"}


def test_a_plain_float_is_the_aggregate_itself():
    assert Samples({"perplexity": 7.5}).aggregate("perplexity") == 7.5
    assert Samples({"perplexity": np.float32(7.5)}).per_sample("perplexity") is None


def test_a_slice_selects_its_samples():
    samples = Samples({"perplexity": [0.0, 1.0, 3.0]}, slices={"tail": np.array([False, True, True])})
    assert samples.aggregate("perplexity", slice="tail") == pytest.approx(math.e**2)
    assert samples.aggregate("perplexity") == pytest.approx(math.exp(4 / 3))


def test_the_summary_reads_back_to_the_same_aggregates():
    samples = Samples({"perplexity": [0.0, 2.0], "rate": 3.0}, slices={"tail": [False, True]})
    summary = samples.summary()
    assert set(summary) == {"perplexity", "perplexity[tail]", "rate"}
    assert all(type(value) is float for value in summary.values())
    again = Samples.of(summary)
    assert again.aggregate("perplexity", "tail") == samples.aggregate("perplexity", "tail")
    assert again.summary() == summary


def test_later_changes_of_the_callers_arrays_change_nothing():
    values, mask = np.array([1.0, 0.0]), np.array([True, False])
    samples = Samples({"accuracy": values}, slices={"tail": mask})
    values[:], mask[:] = 0.0, True
    assert samples.summary() == {"accuracy": 0.5, "accuracy[tail]": 1.0}
    with pytest.raises(ValueError, match="read-only"):
        samples.per_sample("accuracy")[0] = 9.0  # pyright: ignore[reportOptionalSubscript]


def test_of_takes_samples_and_mappings():
    samples = Samples({"accuracy": [1, 0]})
    assert Samples.of(samples) is samples
    assert Samples.of({"accuracy": [True, False]}).aggregate("accuracy") == 0.5


def test_overflow_is_infinity_without_a_warning():
    assert Samples({"perplexity": [1000.0]}).aggregate("perplexity") == math.inf


@pytest.mark.parametrize(
    ("values", "slices", "message"),
    [
        ({}, {}, "no metric given; pass at least one"),
        ({"a": []}, {}, "metric 'a': no samples given"),
        ({"a": [[1.0, 2.0]]}, {}, r"metric 'a': shape \(1, 2\) given; pass one number per sample"),
        ({"a": "high"}, {}, "metric 'a': not numbers"),
        ({"a": [1, 0]}, {"s": [1, 0]}, r"slice 's': int64 of shape \(2,\) given; pass one True or False"),
        ({"a": [1, 0]}, {"s": [True]}, "slice 's' masks 1 samples, but 'a' has 2"),
        ({"a": [1, 0], "b": [1]}, {"s": [True, False]}, "slice 's' masks 2 samples, but 'b' has 1"),
        ({"a": [1, 0]}, {"s": [False, False]}, "slice 's' selects none of 2 samples"),
        ({"a": 1.0}, {"s": [True]}, "slice 's': no metric has samples to select from"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(values, slices, message):
    with pytest.raises(ValueError, match=message) as error:
        Samples(values, slices=slices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metric", "slice_", "message"),
    [
        ("f1", None, "metric 'f1' asked; measured were 'accuracy', 'rate'"),
        ("accuracy", "head", "slice 'head' of 'accuracy' asked; there are 'tail'"),
        ("rate", "tail", r"rate\[tail\] asked, but 'rate' is a plain float"),
    ],
)
def test_what_is_missing_is_named_beside_what_there_is(metric, slice_, message):
    samples = Samples({"accuracy": [1, 0], "rate": 3.0}, slices={"tail": [True, False]})
    with pytest.raises(ValueError, match=message):
        samples.aggregate(metric, slice_)


def test_of_names_what_it_got():
    with pytest.raises(ValueError, match=r"evaluate returned float; return recoup\.Samples or a mapping"):
        Samples.of(0.5)  # pyright: ignore[reportArgumentType]
