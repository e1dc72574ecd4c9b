"""Scores of predicted numbers: outcomes are (examples, 2), the prediction and the truth."""

from __future__ import annotations

import numpy as np

from lightsft.metrics.arrays import Array, average_ranks


def regression_scores(outcomes: Array) -> dict[str, float | None]:
    """Pearson, Spearman, RMSE, MAE and R^2; None for what these examples do not define, all of them with a NaN.

    RMSE = sqrt(mean (p - y)^2) and MAE = mean |p - y| are in the unit of the truth; R^2 = 1 - sum (p - y)^2 /
    sum (y - mean y)^2 is below 0 for predictions worse than the mean.
    """
    if not len(outcomes) or not np.isfinite(outcomes).all():
        return dict.fromkeys(("pearson", "spearman", "rmse", "mae", "r2"))
    predicted, truth = outcomes.astype(float).T
    error = predicted - truth
    return {
        "pearson": pearson(predicted, truth),
        "spearman": spearman(predicted, truth),
        "rmse": float(np.sqrt((error**2).mean())),
        "mae": float(np.abs(error).mean()),
        "r2": _determination(error, truth),
    }


def pearson(one: Array, other: Array) -> float | None:
    """r = sum dx dy / sqrt(sum dx^2 sum dy^2), dx = x - mean x; None when either is constant.

    one, other: (examples,). Each is divided by its largest deviation first, so that no square over- or underflows.
    """
    deviations = [_deviation(values) for values in (one, other)]
    if any(values is None for values in deviations):
        return None
    x, y = (values for values in deviations if values is not None)
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(one: Array, other: Array) -> float | None:
    """Pearson's r of the ranks, equal values sharing the mean of their ranks; None when either is constant."""
    return pearson(average_ranks(one), average_ranks(other))


def _deviation(values: Array) -> Array | None:
    """Deviations from the mean, the largest being 1; None when there are none."""
    if values.max() == values.min():
        return None  # the mean of equal numbers may differ from them in the last bit
    deviation: Array = values - values.mean()
    deviation /= np.abs(deviation).max()
    return deviation


def _determination(error: Array, truth: Array) -> float | None:
    if truth.max() == truth.min():
        return None
    scale = np.abs(truth - truth.mean()).max()
    return float(1 - ((error / scale) ** 2).sum() / (((truth - truth.mean()) / scale) ** 2).sum())
