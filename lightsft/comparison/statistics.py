"""Intervals of a score over test examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from lightsft.tasks.base import Task

RESAMPLES = 1000


def interval(task: Task, outcomes: Sequence[np.ndarray[Any, Any]], metric: str) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean score over seeds, resampling test examples.

    `outcomes` holds one array per seed, all over the same examples; each resample draws the same examples for every
    seed. It covers the choice of test examples; the spread between a few seeds is reported beside it.
    """

    def score(indices: np.ndarray[Any, Any]) -> float:
        return float(np.mean([task.score(rows[indices], metric) for rows in outcomes]))

    examples = np.arange(len(outcomes[0]))
    result = stats.bootstrap(
        (examples,),
        score,
        n_resamples=RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return float(low), float(high)
