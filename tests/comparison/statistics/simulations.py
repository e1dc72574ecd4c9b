"""Strategies whose true scores are known, on test examples of which some are hard for all of them.

An answer is right with probability sigmoid(z), z = worth[strategy] + seed + difficulty[example] + taste[strategy,
example] + whim[strategy, seed, example], all but the worth normal: seeds and examples crossed, as in a comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from lightsft.comparison.statistics.resampling import Scored

RESAMPLES = 1000
QUANTILES = special.ndtri((np.arange(2000) + 0.5) / 2000)


@dataclass(frozen=True)
class World:
    """Standard deviations on the scale of log odds, and the share of right answers to be expected."""

    accuracy: float = 0.85
    seed: float = 0.1
    difficulty: float = 1.5
    taste: float = 0.0
    whim: float = 0.5

    def worth(self, accuracy: float) -> float:
        """The log odds at which the expected share of right answers is `accuracy`."""
        spread = np.sqrt(self.seed**2 + self.difficulty**2 + self.taste**2 + self.whim**2) * QUANTILES
        return float(optimize.brentq(lambda worth: special.expit(worth + spread).mean() - accuracy, -20, 20))

    def answers(self, random, gains, runs, seeds, examples):
        """(runs, strategies, seeds, examples), 1 where right; `gains` are added to the accuracy of each strategy."""

        def effect(deviation, *shape):
            return deviation * random.standard_normal(shape, dtype=np.float32)

        count = len(gains)
        odds = np.array([self.worth(self.accuracy + gain) for gain in gains], dtype=np.float32)[:, None, None]
        odds = odds + effect(self.seed, runs, count, seeds, 1) + effect(self.difficulty, runs, 1, 1, examples)
        odds += effect(self.taste, runs, count, 1, examples) + effect(self.whim, runs, count, seeds, examples)
        return (random.random(odds.shape, dtype=np.float32) < special.expit(odds)).astype(np.float32)


ALIKE = World()  # one strategy under several names
DIFFERENT = World(taste=0.7)  # different strategies of equal worth
UNSTEADY = World(seed=0.4, taste=0.7)  # seeds that differ by about 4 points


def accuracies(world, *, seeds, examples, runs, gains=(0.0,) * 5, number=0) -> Iterator[list[Scored]]:
    """One comparison of strategies after the other, scored by their share of right answers."""
    random, batch = np.random.default_rng((number, seeds, examples)), 50
    draws = _draws(random, examples)
    for _ in range(0, runs, batch):
        right = world.answers(random, gains, batch, seeds, examples)
        scores, resampled = right.mean(axis=-1), right @ draws / examples
        for run in range(batch):
            yield [
                Scored(str(name), scores[run, name].astype(float), resampled[run, name].astype(float), examples)
                for name in range(len(gains))
            ]


def macro_f1s(world, *, seeds, examples, runs, share=0.3, number=0) -> Iterator[list[Scored]]:
    """The same of one strategy, scored by macro F1 of two classes of which one has a share of 0.3."""
    random, batch = np.random.default_rng((number, seeds, examples)), 50
    draws, everything = _draws(random, examples), np.ones((examples, 1), np.float32)
    for _ in range(0, runs, batch):
        right = world.answers(random, (0.0,), batch, seeds, examples)[:, 0]
        truth = (random.random((batch, 1, examples)) < share).astype(np.float32)
        scores, resampled = (_macro_f1(right, truth, chosen) for chosen in (everything, draws))
        for run in range(batch):
            yield [Scored("0", scores[run, :, 0], resampled[run], examples)]


def _macro_f1(right, truth, chosen):
    """(runs, seeds, draws) of right (runs, seeds, examples), truth (runs, 1, examples), chosen (examples, draws)."""
    positive, negative = (right * truth) @ chosen, (right * (1 - truth)) @ chosen
    positives, negatives = truth @ chosen, (1 - truth) @ chosen
    found = 2 * positive / (positive + (negatives - negative) + positives)
    rejected = 2 * negative / (negative + (positives - positive) + negatives)
    return ((found + rejected) / 2).astype(float)


def _draws(random, examples):
    """(examples, RESAMPLES): how often each example is drawn."""
    return random.multinomial(examples, np.full(examples, 1 / examples), RESAMPLES).T.astype(np.float32)
