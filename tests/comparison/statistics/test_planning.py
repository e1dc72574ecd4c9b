"""Holm's correction, power, and the numbers of seeds and examples that a difference needs."""

import numpy as np
import pytest
from scipy import stats

from lightsft.comparison.statistics.holm import holm
from lightsft.comparison.statistics.power import detectable, examples_needed, power, seeds_needed
from lightsft.comparison.statistics.variance import Side, Variance

PARTS = Variance((Side(5, 2e-5, 1e-5), Side(5, 4e-5, 1e-5)), examples=1e-5, size=600)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.4]) == [0.8, 0.8]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("alpha", [0.05, 0.005])
@pytest.mark.parametrize("df", [2, 7.5, 300])
def test_power_is_how_often_a_t_test_finds_the_difference(df, alpha):
    random = np.random.default_rng(0)
    parts = Variance((), 1.0, int(df) + 1) if df == int(df) else Variance((Side(2, 1.0, 0.0),), 6.5 / 1 * 1e-9, 2)
    freedom, shift = parts.degrees_of_freedom, 3.5
    values = (random.normal(size=400_000) + shift) / np.sqrt(random.chisquare(freedom, 400_000) / freedom)
    expected = np.mean(values > stats.t.isf(alpha / 2, freedom))
    assert power(shift * parts.standard_error, parts, alpha) == pytest.approx(expected, abs=0.004)


def test_power_without_a_difference_is_half_of_alpha():
    assert power(0.0, PARTS, 0.05) == pytest.approx(0.025)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 45])
@pytest.mark.parametrize("parts", [PARTS, PARTS.with_seeds(2), Variance((), 1e-4, 12), Variance((), 1.0, 2)])
def test_what_is_detectable_is_found_with_a_power_of_80_percent(parts, alpha):
    assert power(detectable(parts, alpha), parts, alpha) == pytest.approx(0.8)


@pytest.mark.parametrize("effect", [0.012, 0.02, 0.04])
def test_seeds_needed_are_the_fewest_with_a_power_of_80_percent(effect):
    by_hand = next(s for s in range(2, 200) if power(effect, PARTS.with_seeds(s), 0.01) >= 0.8)
    assert seeds_needed(effect, PARTS, 0.01) == by_hand


def test_examples_can_forbid_a_difference_that_more_of_them_would_show():
    parts = Variance((Side(5, 1e-6, 1e-5), Side(5, 1e-6, 1e-5)), examples=3e-5, size=600)
    assert seeds_needed(0.01, parts, 0.05) is None
    needed = examples_needed(0.01, parts, 0.05)
    assert power(0.01, parts.with_examples(needed), 0.05) >= 0.8 > power(0.01, parts.with_examples(needed - 1), 0.05)
    assert needed > 600


def test_no_number_of_examples_helps_where_the_seeds_forbid_it():
    assert examples_needed(0.005, PARTS, 0.01) is None


def test_of_one_seed_no_number_of_seeds_is_known():
    assert seeds_needed(0.01, Variance((), 1e-5, 600), 0.05) is None


def test_with_more_seeds_and_examples_the_parts_shrink_as_they_should():
    more, larger = PARTS.with_seeds(10), PARTS.with_examples(1200)
    assert more.total == pytest.approx(8e-5 / 2 + 1e-5)
    assert larger.total == pytest.approx(6e-5 + (2e-5 + 1e-5) / 2)
    assert larger.size == 1200


def test_without_any_variance_everything_is_found():
    parts = Variance((Side(2, 0.0, 0.0),), 0.0, 600)
    assert (power(0.1, parts, 0.05), detectable(parts, 0.05), seeds_needed(0.1, parts, 0.05)) == (1.0, 0.0, 2)
