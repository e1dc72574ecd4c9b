"""Scores of every trial on the same resamples of the test examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightsft.errors import ConfigurationError, DataError

Array = np.ndarray[Any, Any]

RESAMPLES = 2000
FEWEST = 0.05  # of the resamples, on which a score has to be defined for its variance to be one


@dataclass(frozen=True)
class Measured:
    """What is known of a strategy: outcomes (examples, width) on the test split for each of its seeds.

    score: the metric of any selection of outcomes, NaN where it is undefined. costs: by name, less being better. A
    baseline has one array and no seeds that it could vary over.
    """

    label: str
    seeds: tuple[int, ...]
    outcomes: Sequence[Array]
    score: Callable[[Array], float]
    costs: Mapping[str, float | None] = field(default_factory=dict)
    baseline: bool = False


@dataclass(frozen=True)
class Scored:
    """Scores (seeds,) of all examples and (seeds, resamples) of each resample, the same ones for every strategy.

    varies: whether another seed would have given another score, which no seed of a baseline would.
    """

    label: str
    scores: Array
    resampled: Array
    examples: int
    varies: bool = True


def resample(measured: Sequence[Measured], resamples: int = RESAMPLES) -> list[Scored]:
    """Scores of all on `resamples` draws of as many examples as there are, with replacement.

    Draw b takes the same examples for every strategy and seed: differences between them are paired. One draw is held
    in memory at a time. The draws depend on the numbers of examples and resamples alone.
    """
    examples = _check(measured)
    trials = [(one.score, np.ascontiguousarray(rows)) for one in measured for rows in one.outcomes]
    scores = np.array([score(rows) for score, rows in trials], dtype=float)
    scores[~np.isfinite(scores)] = np.nan
    resampled = np.empty((len(trials), resamples))
    random = np.random.default_rng(0)
    for draw in range(resamples):
        chosen = random.integers(examples, size=examples)
        resampled[:, draw] = [score(rows.take(chosen, axis=0)) for score, rows in trials]
    resampled[~np.isfinite(resampled)] = np.nan
    ends = np.cumsum([len(one.outcomes) for one in measured])
    return [
        Scored(one.label, scores[end - len(one.outcomes) : end], resampled[end - len(one.outcomes) : end], examples,
               varies=not (one.baseline and len(one.outcomes) == 1))
        for one, end in zip(measured, ends, strict=True)
    ]  # fmt: skip


def variance(values: Array, examples: int) -> float:
    """Variance over resamples (resamples,), those without a score left out; NaN where too few are left.

    n / (n - 1) undoes what drawing from n examples instead of from where they came from takes away: the bootstrap
    variance of a mean is (n - 1) / n of its unbiased estimate.
    """
    defined = values[np.isfinite(values)]
    if len(defined) < max(2, FEWEST * len(values)) or examples < 2:
        return float("nan")
    return float(defined.var()) * examples / (examples - 1)


def undefined(scored: Scored) -> float:
    """The share of the resamples on which some seed has no score."""
    return float(1 - np.isfinite(scored.resampled).all(axis=0).mean())


def _check(measured: Sequence[Measured]) -> int:
    labels = [one.label for one in measured]
    if len(set(labels)) < len(labels) or not labels:
        raise ConfigurationError(f"the strategies are {labels}", expected="at least one, each with a name of its own")
    for one in measured:
        if len(one.outcomes) != len(one.seeds) or not one.seeds:
            raise DataError(
                f"{one.label} has {len(one.seeds)} seeds and {len(one.outcomes)} arrays of outcomes",
                expected="one array for each seed",
            )
    sizes = {one.label: sorted({len(rows) for rows in one.outcomes}) for one in measured}
    found = {size for each in sizes.values() for size in each}
    if len(found) > 1 or not min(found):
        raise DataError(f"examples by strategy: {sizes}", expected="outcomes of the same test examples for all")
    return found.pop()
