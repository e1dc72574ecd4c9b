"""What several scores are made of: ratios that may be empty, ranks with ties, precision and recall from counts."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator elementwise, 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    found: Array = np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)
    return found


def average_ranks(values: Array) -> Array:
    """Ranks from 1 of (examples,) values; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def precision_recall_f1(hits: Array, predicted: Array, truly: Array) -> tuple[Array, Array, Array]:
    """hits / predicted, hits / truly and 2 hits / (predicted + truly), elementwise, 0 where nothing is divided by.

    F1 is the harmonic mean of the other two wherever that exists.
    """
    hits = np.asarray(hits, dtype=float)
    return ratio(hits, predicted), ratio(hits, truly), ratio(2 * hits, predicted + truly)


def mean_or_none(values: Array) -> float | None:
    """The mean of those that are numbers; None when there are none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None
