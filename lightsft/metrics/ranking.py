"""How well scores put positives before negatives: area under the ROC curve, average precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightsft.metrics.arrays import Array, average_ranks

Ranking = Callable[[Array, Array], float]


def auroc(scores: Array, truth: Array) -> float:
    """(R - P (P + 1) / 2) / (P N): the share of pairs in which the positive has the higher score, ties counting half.

    scores: (examples,), truth: (examples,) of 0 and 1. R is the sum of the positives' ranks, P and N the numbers of
    positives and negatives (Hanley and McNeil, 1982). NaN where one of them is 0 or a score is NaN.
    """
    positive = truth.astype(bool)
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives or np.isnan(scores).any():
        return float("nan")
    above = average_ranks(scores)[positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(scores: Array, truth: Array) -> float:
    """sum_n (R_n - R_(n-1)) P_n over the distinct scores as thresholds, from the highest down.

    scores: (examples,), truth: (examples,) of 0 and 1. Examples of equal score come in together; nothing is
    interpolated. NaN without a positive or where a score is NaN.
    """
    positives = int(truth.astype(bool).sum())
    if not positives or np.isnan(scores).any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(ordered[1:] != ordered[:-1], True)  # the last example at each threshold
    hits = np.cumsum(truth[order].astype(bool))[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / positives)


def of_columns(score: Ranking, scores: Array, truth: Array) -> Array:
    """`score` of each column of (examples, classes) scores and 0/1 truth: (classes,), NaN where undefined."""
    return np.array([score(scores[:, column], truth[:, column]) for column in range(scores.shape[1])])
