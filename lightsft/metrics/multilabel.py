"""Scores of any number of labels per example: outcomes are (examples, 2 classes), probabilities then 0/1 truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightsft.metrics.arrays import Array, mean_or_none, precision_recall_f1
from lightsft.metrics.ranking import auroc, average_precision, of_columns


def multilabel_scores(outcomes: Array, threshold: float = 0.5) -> dict[str, float | None]:
    """Precision, recall and F1 (micro, macro, samples), subset accuracy, Hamming loss, AUROC, mean AP.

    A class is predicted where its probability is at least `threshold`. Micro: of the counts summed over classes.
    Macro: the mean over all classes. Samples: the mean over examples; 0 for one without a label and a prediction, as
    scikit-learn's zero_division=0 has it. AUROC and AP are macro, over the classes they are defined for.
    """
    probabilities, truth, predicted = _split(outcomes, threshold)
    right = truth == predicted
    return {
        **_averaged("micro", truth, predicted, axis=None),
        **_averaged("macro", truth, predicted, axis=0),
        **_averaged("samples", truth, predicted, axis=1),
        "subset_accuracy": float(right.all(axis=1).mean()),
        "hamming_loss": float(1 - right.mean()),
        "auroc": mean_or_none(of_columns(auroc, probabilities, truth)),
        "average_precision": mean_or_none(of_columns(average_precision, probabilities, truth)),
    }


def multilabel_per_class(outcomes: Array, labels: list[str], threshold: float = 0.5) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1, AUROC, AP and number of examples of each class; None where one is undefined."""
    probabilities, truth, predicted = _split(outcomes, threshold)
    columns = {
        **dict(zip(("precision", "recall", "f1"), _scores(truth, predicted, axis=0), strict=True)),
        "auroc": of_columns(auroc, probabilities, truth),
        "average_precision": of_columns(average_precision, probabilities, truth),
    }
    return {
        label: {
            **{name: mean_or_none(values[number : number + 1]) for name, values in columns.items()},
            "examples": int(truth[:, number].sum()),
        }
        for number, label in enumerate(labels)
    }


def _split(outcomes: Array, threshold: float) -> tuple[Array, Array, Array]:
    """Probabilities, truth and predictions, each (examples, classes)."""
    probabilities, truth = np.hsplit(outcomes, 2)
    return probabilities, truth > 0.5, probabilities >= threshold


def _scores(truth: Array, predicted: Array, axis: int | None) -> tuple[Array, Array, Array]:
    return precision_recall_f1(*(hit.sum(axis=axis) for hit in (truth & predicted, predicted, truth)))


def _averaged(name: str, truth: Array, predicted: Array, axis: int | None) -> dict[str, float | None]:
    precision, recall, f1 = (float(score.mean()) for score in _scores(truth, predicted, axis))
    return {f"{name}_precision": precision, f"{name}_recall": recall, f"{name}_f1": f1}
