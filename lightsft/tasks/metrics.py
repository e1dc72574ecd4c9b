"""Scores from per-example outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def confusion_matrix(truth: Array, predicted: Array, classes: int) -> Array:
    """(classes, classes) counts; rows are the true label, columns the predicted one."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def classification_scores(matrix: Array) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 averaged over classes (macro) and over examples (micro).

    precision_c = TP / predicted as c, recall_c = TP / truly c, F1_c = 2 TP / (predicted + truly); 0 where the
    denominator is 0. Macro averages run over the classes that occur in truth or prediction.
    """
    hits = np.diag(matrix).astype(float)
    predicted, truly = matrix.sum(axis=0), matrix.sum(axis=1)
    occurs = (predicted + truly) > 0
    precision = _ratio(hits, predicted)[occurs]
    recall = _ratio(hits, truly)[occurs]
    f1 = _ratio(2 * hits, predicted + truly)[occurs]
    accuracy = float(hits.sum() / max(1, matrix.sum()))
    return {
        "accuracy": accuracy,
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "micro_f1": accuracy,  # with one label per example, micro precision, recall and F1 are the accuracy
    }


def per_class_scores(matrix: Array, labels: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of examples of each class."""
    hits = np.diag(matrix).astype(float)
    predicted, truly = matrix.sum(axis=0), matrix.sum(axis=1)
    rows = zip(_ratio(hits, predicted), _ratio(hits, truly), _ratio(2 * hits, predicted + truly), truly, strict=True)
    return {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for label, (p, r, f, n) in zip(labels, rows, strict=True)
    }


def _ratio(numerator: Array, denominator: Array) -> Array:
    ratio: Array = np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
    return ratio
