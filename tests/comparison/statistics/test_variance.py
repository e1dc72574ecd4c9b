"""The parts of a variance against the analysis of variance, and Student's, Welch's and the paired t-test."""

import numpy as np
import pytest
from scipy import stats

from lightsft.comparison.statistics.estimate import estimate, interval_of, parts_of, steadiness_of
from lightsft.comparison.statistics.paired import difference
from lightsft.comparison.statistics.resampling import Scored
from lightsft.comparison.statistics.variance import Side, Variance
from lightsft.metrics.units import POINTS

EXAMPLES = 40
DRAWS = np.random.default_rng(9).multinomial(EXAMPLES, np.full(EXAMPLES, 1 / EXAMPLES), 40_000) / EXAMPLES


def scored(values, label="a", varies=True):
    """Means of values (seeds, examples), on all examples and on draws of them."""
    return Scored(label, values.mean(axis=1), values @ DRAWS.T, values.shape[1], varies)


def constant(scores, label="a", varies=True):
    """Scores that are the same whatever the examples."""
    scores = np.asarray(scores, dtype=float)
    return Scored(label, scores, np.tile(scores[:, None], 200), 1_000_000, varies)


def crossed(seeds, seed_effect=0.5, number=0):
    random = np.random.default_rng(number)
    values = random.normal(size=(seeds, EXAMPLES)) + random.normal(size=EXAMPLES)
    return values + seed_effect * random.normal(size=(seeds, 1))


def anova(values):
    """(training, residual, examples): mean squares of the two ways, as variances of the mean."""
    seeds, examples = values.shape
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    of_seeds = examples * ((rows - mean) ** 2).sum() / (seeds - 1)
    of_examples = seeds * ((columns - mean) ** 2).sum() / (examples - 1)
    rest = ((values - rows[:, None] - columns + mean) ** 2).sum() / ((seeds - 1) * (examples - 1))
    return np.array([of_seeds - rest, rest, of_examples - rest]) / (seeds * examples)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_parts_are_those_of_the_analysis_of_variance(seeds):
    values = crossed(seeds)
    parts = parts_of(scored(values))
    (side,) = parts.sides
    expected = anova(values)
    assert [side.training, side.residual, parts.examples] == pytest.approx(expected, rel=0.05)
    assert parts.total == pytest.approx(expected.sum(), rel=0.02)


def test_the_parts_of_a_difference_are_those_of_its_analysis_of_variance_for_examples():
    one, other = crossed(4, number=1), crossed(4, number=2)
    parts = difference(scored(one), scored(other, "b")).parts
    gaps = one.mean(axis=0) - other.mean(axis=0)
    residuals = anova(one)[1] + anova(other)[1]
    assert parts.examples == pytest.approx(gaps.var(ddof=1) / EXAMPLES - residuals, rel=0.05)
    assert [side.training for side in parts.sides] == pytest.approx([anova(one)[0], anova(other)[0]], rel=0.1)


def test_seeds_that_differ_less_than_their_examples_make_them_have_no_part_of_their_own():
    values = crossed(5, seed_effect=0)
    values -= values.mean(axis=1, keepdims=True)
    parts = parts_of(scored(values))
    assert parts.sides[0].training == 0
    assert parts.total == pytest.approx(values.mean(axis=0).var(ddof=1) / EXAMPLES, rel=0.02)


def test_without_a_part_of_the_examples_the_interval_is_students():
    scores = np.random.default_rng(0).normal(size=6)
    found = estimate(constant(scores))
    expected = stats.ttest_1samp(scores, 0).confidence_interval()
    assert found.interval == pytest.approx([expected.low, expected.high])
    assert found.variance.degrees_of_freedom == pytest.approx(5)
    assert found.spread == np.ptp(scores)


def test_without_a_part_of_the_examples_the_test_is_welchs():
    random = np.random.default_rng(3)
    one, other = random.normal(1, 1, 4), random.normal(0, 3, 7)
    found, expected = difference(constant(one), constant(other, "b")), stats.ttest_ind(one, other, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.parts.degrees_of_freedom == pytest.approx(expected.df)
    assert found.interval == pytest.approx(list(expected.confidence_interval()))


def test_against_a_baseline_without_a_part_of_the_examples_the_test_is_students():
    scores = np.random.default_rng(4).normal(size=5)
    found = difference(constant(scores), constant([0.3], "untuned", varies=False))
    assert found.p == pytest.approx(stats.ttest_1samp(scores, 0.3).pvalue)
    assert found.one_seed == ()


def test_with_one_seed_each_the_test_is_the_paired_one_over_examples():
    one, other = crossed(1, number=1), crossed(1, number=2) + 0.5
    found, expected = difference(scored(one), scored(other, "b")), stats.ttest_rel(one[0], other[0])
    assert found.difference / found.parts.standard_error == pytest.approx(expected.statistic, rel=0.02)
    assert found.p == pytest.approx(expected.pvalue, rel=0.1)
    assert found.parts.degrees_of_freedom == pytest.approx(EXAMPLES - 1)
    assert found.one_seed == ("a", "b")


def test_degrees_of_freedom_are_the_harmonic_mean_of_both_weighed_by_their_parts():
    parts = Variance((Side(3, training=0.2, residual=0.1),), examples=0.7, size=101)
    assert parts.degrees_of_freedom == pytest.approx(1 / (0.2 / 2 + 0.8 / 100))
    assert interval_of(5.0, parts)[1] == pytest.approx(5 + stats.t.isf(0.025, parts.degrees_of_freedom))


def test_equal_seeds_are_as_good_as_different_ones():
    one, other = scored(crossed(5)), scored(crossed(5), "b")
    found = difference(one, other)
    assert (found.difference, found.p, found.superiority, found.effect_size) == (0, 1, 0.5, 0)


def test_effect_size_is_hedges_g():
    one, other = np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0, 4.0, 3.0])
    pooled = np.sqrt((one.var(ddof=1) * 2 + other.var(ddof=1) * 3) / 5)
    expected = (one.mean() - other.mean()) / pooled * (1 - 3 / 19)
    assert difference(constant(one), constant(other, "b")).effect_size == pytest.approx(expected)
    assert difference(constant(one), constant(other, "b"), sign=-1).effect_size == pytest.approx(-expected)
    assert difference(constant(one), constant([2.0], "b")).effect_size is None
    assert difference(constant([1.0, 1.0]), constant([2.0, 2.0], "b")).effect_size is None


def test_superiority_is_the_share_of_pairs_of_seeds():
    found = difference(constant([1.0, 2.0]), constant([0.0, 1.0, 3.0], "b"))
    assert found.superiority == (1 + 0.5 + 0 + 1 + 1 + 0) / 6


def test_a_steady_strategy_is_taken_to_vary_as_the_median_does_and_of_two_seeds_as_the_mean():
    unsteady = [constant(scores) for scores in ([0.0, 1.0, 2.0], [0.0, 2.0, 4.0], [0.0, 10.0, 20.0])]
    steadiness = steadiness_of([*unsteady, constant([5.0])])
    assert (steadiness.median, steadiness.mean) == pytest.approx((4, 35))
    assert parts_of(unsteady[0], steadiness).sides[0].training == pytest.approx(4 / 3)
    assert parts_of(unsteady[2], steadiness).sides[0].training == pytest.approx(100 / 3)
    assert parts_of(constant([0.0, 0.1]), steadiness).sides[0].training == pytest.approx(35 / 2)
    assert steadiness_of([constant([5.0])]).least(2) == 0


def test_an_interval_ends_where_the_score_does():
    found = estimate(constant([0.9, 0.99, 0.97]), POINTS)
    assert found.interval[1] == 1
    assert estimate(constant([0.9, 0.99, 0.97])).interval[1] > 1
