"""Whether the statistics keep what they promise, where the truth is known."""

import numpy as np
import pytest

from lightsft.comparison.statistics.power import detectable, power
from lightsft.comparison.statistics.variance import Side, Variance
from tests.comparison.statistics import simulations
from tests.comparison.statistics.simulations import ALIKE, DIFFERENT, UNSTEADY, comparisons, gaps_of

pytestmark = pytest.mark.slow
CHANCE = 1.645 * np.sqrt(0.05 * 0.95 / 1000)  # by which 5 % of 1,000 is exceeded once in twenty


@pytest.mark.parametrize("world", [ALIKE, UNSTEADY], ids=["alike", "unsteady"])
@pytest.mark.parametrize("examples", [100, 600])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_a_difference_among_five_equal_strategies_is_found_in_5_percent_of_comparisons_at_most(seeds, examples, world):
    assert simulations.family_wise(comparisons(world, seeds=seeds, examples=examples)) <= 0.05 + CHANCE


@pytest.mark.parametrize("metric", [simulations.accuracy, simulations.macro_f1])
@pytest.mark.parametrize(("seeds", "examples"), [(3, 100), (3, 600), (5, 100), (5, 600)])
def test_95_percent_of_the_intervals_hold_the_true_score(seeds, examples, metric):
    runs = comparisons(DIFFERENT, seeds=seeds, examples=examples, metric=metric)
    assert 0.93 <= simulations.covered(runs) <= 0.97


def average(parts):
    """What the variances of many comparisons estimate."""
    sides = zip(*(one.sides for one in parts), strict=True)
    means = [
        Side(side[0].seeds, np.mean([one.training for one in side]), np.mean([one.residual for one in side]))
        for side in sides
    ]
    return Variance(tuple(means), float(np.mean([one.examples for one in parts])), parts[0].size)


@pytest.mark.parametrize(("seeds", "examples", "strategies"), [(5, 600, 2), (5, 2000, 2), (10, 600, 2), (5, 2000, 3)])
def test_two_points_are_found_with_the_power_that_is_stated(seeds, examples, strategies):
    gains = (0.02, *[0.0] * (strategies - 1))
    found = [gaps_of(run)[0] for run in comparisons(ALIKE, seeds=seeds, examples=examples, gains=gains)]
    alpha = 0.05 / len(found[0])
    share = np.mean([gaps[0].p <= alpha and gaps[0].difference > 0 for gaps in found])
    stated = power(0.02, average([gaps[0].parts for gaps in found]), alpha)
    assert share == pytest.approx(stated, abs=0.04)


def test_the_difference_said_to_be_detectable_is_found_four_times_in_five():
    settings = {"seeds": 5, "examples": 600}
    parts = average([gaps_of(run)[0][0].parts for run in comparisons(ALIKE, **settings, gains=(0.0, 0.0))])
    shift = detectable(parts, 0.05)
    gains = (shift / 2, -shift / 2)
    found = [gaps_of(run)[0][0] for run in comparisons(ALIKE, **settings, gains=gains)]
    assert np.mean([gap.p <= 0.05 and gap.difference > 0 for gap in found]) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("world", [DIFFERENT, UNSTEADY], ids=["different", "unsteady"])
@pytest.mark.parametrize(("seeds", "examples"), [(2, 600), (3, 100), (3, 600), (5, 600)])
def test_strategies_worse_by_the_margin_are_said_to_be_within_it_in_5_percent_of_comparisons(seeds, examples, world):
    runs = comparisons(world, seeds=seeds, examples=examples, gains=(0.02, 0.0, 0.0, 0.0))
    assert simulations.claims(runs, 0.02) <= 0.05 + CHANCE
