"""Intervals over test examples: right on average, reproducible, and narrower with more examples."""

import numpy as np
import pytest

from lightsft.comparison import statistics
from lightsft.comparison.statistics import interval
from lightsft.tasks import task

BINARY = task("classification", labels=["no", "yes"])


def outcomes(right):
    """Outcomes of a classifier that is right where `right` is 1; the truth is always "yes"."""
    right = np.asarray(right, dtype=float)
    return np.column_stack([1 - right, right, np.ones(len(right))])


def bernoulli(examples, share, seed):
    return outcomes(np.random.default_rng(seed).random(examples) < share)


def test_the_interval_is_the_same_every_time():
    found = [interval(BINARY, [bernoulli(80, 0.7, 0)], "accuracy") for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "macro_recall", "loss"])
def test_the_interval_holds_the_score_and_stays_in_its_range(metric):
    chance = np.random.default_rng(0)
    probabilities = chance.dirichlet([1, 1], 100)
    rows = np.column_stack([probabilities, chance.integers(0, 2, 100)])
    low, high = interval(BINARY, [rows], metric)
    assert low < BINARY.metrics(rows)[metric] < high
    assert low >= 0
    assert high <= 1 or metric == "loss"


def test_the_interval_narrows_with_the_square_root_of_the_examples():
    widths = [np.diff(interval(BINARY, [outcomes([0, 1, 1, 1] * n)], "accuracy"))[0] for n in (10, 40, 160)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.2)


def test_the_interval_has_the_width_of_the_normal_approximation():
    low, high = interval(BINARY, [outcomes([1] * 300 + [0] * 100)], "accuracy")
    expected = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)


def test_seeds_that_err_on_different_examples_give_a_narrower_interval_than_seeds_that_agree():
    one, other = outcomes([1, 0] * 50), outcomes([0, 1] * 50)
    agree, differ = (np.diff(interval(BINARY, seeds, "accuracy"))[0] for seeds in ([one, one], [one, other]))
    assert differ == 0  # each pair of draws of an example is right once
    assert agree > 0.1


def test_a_perfect_score_has_a_point_for_an_interval():
    assert interval(BINARY, [outcomes([1] * 20)], "accuracy") == (1.0, 1.0)


def test_ninety_five_percent_of_the_intervals_cover_the_truth(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    runs, share = 150, 0.7
    bounds = [interval(BINARY, [bernoulli(120, share, seed)], "accuracy") for seed in range(runs)]
    covered = np.mean([low <= share <= high for low, high in bounds])
    assert 0.88 <= covered <= 0.99
