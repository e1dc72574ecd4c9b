"""Strategies whose true scores are known, on test examples of which some are hard for all of them.

An answer is right with probability sigmoid(z), z = worth[strategy] + seed + difficulty[example] + taste[strategy,
example] + whim[strategy, seed, example], all but the worth normal: seeds and examples crossed, as in a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy import optimize, special

from lightsft.comparison.statistics.estimate import interval_of, parts_of, steadiness_of
from lightsft.comparison.statistics.holm import holm
from lightsft.comparison.statistics.paired import Difference, above, difference
from lightsft.comparison.statistics.resampling import Scored

Array = np.ndarray[Any, Any]
Comparisons = Iterator[list[Scored]]

RESAMPLES = 1000
BATCH = 50  # comparisons that are resampled at once
SHARE = 0.3  # of examples of the second class, for macro F1
QUANTILES = special.ndtri((np.arange(2000) + 0.5) / 2000)


@dataclass(frozen=True)
class World:
    """The share of right answers to be expected, and standard deviations on the scale of log odds."""

    accuracy: float = 0.85
    seed: float = 0.1
    difficulty: float = 1.5
    taste: float = 0.0
    whim: float = 0.5

    def worth(self, accuracy: float) -> float:
        """The log odds at which the expected share of right answers is `accuracy`."""
        spread = np.sqrt(self.seed**2 + self.difficulty**2 + self.taste**2 + self.whim**2) * QUANTILES
        return float(optimize.brentq(lambda worth: special.expit(worth + spread).mean() - accuracy, -20, 20))

    def answers(self, random: np.random.Generator, gains: tuple[float, ...], seeds: int, examples: int) -> Array:
        """(BATCH, strategies, seeds, examples), 1 where right; `gains` are added to each strategy's accuracy."""

        def effect(deviation: float, *shape: int) -> Array:
            return deviation * random.standard_normal((BATCH, *shape), dtype=np.float32)

        count = len(gains)
        odds = np.array([self.worth(self.accuracy + gain) for gain in gains], dtype=np.float32)[:, None, None]
        odds = odds + effect(self.seed, count, seeds, 1) + effect(self.difficulty, 1, 1, examples)
        odds += effect(self.taste, count, 1, examples) + effect(self.whim, count, seeds, examples)
        return (random.random(odds.shape, dtype=np.float32) < special.expit(odds)).astype(np.float32)


ALIKE = World()  # one strategy under several names: seeds differ by about a point
DIFFERENT = World(taste=0.7)  # strategies of equal worth that err on different examples
UNSTEADY = World(seed=0.4, taste=0.7)  # seeds that differ by about 4 points
WORLDS = {"alike": ALIKE, "different": DIFFERENT, "unsteady": UNSTEADY}

Metric = Callable[[Array, Array, Array], Array]


def accuracy(right: Array, truth: Array, chosen: Array) -> Array:
    """(..., draws) of right (..., examples) and how often each is drawn (examples, draws)."""
    return right @ chosen / chosen[:, 0].sum()


def macro_f1(right: Array, truth: Array, chosen: Array) -> Array:
    """The same, of two classes; truth: (BATCH, 1, 1, examples), 1 where it is the second one."""
    positive, negative = (right * truth) @ chosen, (right * (1 - truth)) @ chosen
    positives, negatives = truth @ chosen, (1 - truth) @ chosen
    found = 2 * positive / (positive + (negatives - negative) + positives)
    rejected = 2 * negative / (negative + (positives - positive) + negatives)
    return (found + rejected) / 2


def comparisons(
    world: World,
    *,
    seeds: int,
    examples: int,
    runs: int = 1000,
    gains: tuple[float, ...] = (0.0,) * 5,
    metric: Metric = accuracy,
) -> Comparisons:
    """One comparison after the other: the scores of every strategy, on all examples and on resamples."""
    random = np.random.default_rng((seeds, examples))
    everything = np.ones((examples, 1), np.float32)
    draws = random.multinomial(examples, np.full(examples, 1 / examples), RESAMPLES).T.astype(np.float32)
    for _ in range(0, runs, BATCH):
        right = world.answers(random, gains, seeds, examples)
        truth = (random.random((BATCH, 1, 1, examples)) < SHARE).astype(np.float32)
        scores, resampled = (metric(right, truth, chosen).astype(float) for chosen in (everything, draws))
        for run in range(BATCH):
            yield [
                Scored(str(name), scores[run, name, :, 0], resampled[run, name], examples) for name in range(len(gains))
            ]


def gaps_of(strategies: list[Scored]) -> tuple[list[Difference], list[float]]:
    """Every two of them, and Holm's p-values."""
    steadiness = steadiness_of(strategies)
    found = [difference(one, other, steadiness=steadiness) for one, other in combinations(strategies, 2)]
    return found, holm([one.p for one in found])


def family_wise(runs: Comparisons) -> float:
    """The share of comparisons in which any difference is found."""
    return float(np.mean([min(gaps_of(strategies)[1]) <= 0.05 for strategies in runs]))


def covered(runs: Comparisons) -> float:
    """The share of intervals of the first strategy that hold its mean over all comparisons."""
    found, means = [], []
    for strategies in runs:
        parts = parts_of(strategies[0], steadiness_of(strategies))
        assert parts is not None
        means.append(strategies[0].scores.mean())
        found.append(interval_of(means[-1], parts))
    low, high = np.array(found).T
    return float(((low <= np.mean(means)) & (np.mean(means) <= high)).mean())


def claims(runs: Comparisons, margin: float) -> float:
    """The share of comparisons in which any other strategy is said to be within `margin` of the first."""
    found = []
    for best, *others in runs:
        steadiness = steadiness_of([best, *others])
        gaps = [difference(other, best, steadiness=steadiness) for other in others]
        found.append(min(holm([above(gap, -margin) for gap in gaps])) <= 0.05)
    return float(np.mean(found))
