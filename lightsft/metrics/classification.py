"""Scores of one label per example: from a confusion matrix, and from the probabilities of the classes."""

from __future__ import annotations

import numpy as np

from lightsft.metrics.arrays import Array, mean_or_none, precision_recall_f1
from lightsft.metrics.ranking import Ranking, auroc, average_precision, of_columns

LEAST_PROBABILITY = 1e-12  # keeps the loss of a certain mistake finite


def confusion_matrix(truth: Array, predicted: Array, classes: int) -> Array:
    """(classes, classes) counts; rows are the true label, columns the predicted one."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def classification_scores(matrix: Array) -> dict[str, float]:
    """Accuracy, MCC, and precision, recall and F1 averaged over classes (macro) and over examples (micro).

    precision_c = TP / predicted as c, recall_c = TP / truly c, F1_c = 2 TP / (predicted + truly); 0 where the
    denominator is 0. Macro averages run over the classes that occur in truth or prediction.
    """
    hits, predicted, truly = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    occurs = (predicted + truly) > 0
    precision, recall, f1 = (score[occurs] for score in precision_recall_f1(hits, predicted, truly))
    accuracy = float(hits.sum() / max(1, matrix.sum()))
    return {
        "accuracy": accuracy,
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "micro_precision": accuracy,  # with one label per example, micro precision, recall and F1 are the accuracy
        "micro_recall": accuracy,
        "micro_f1": accuracy,
        "mcc": matthews_correlation(matrix),
    }


def matthews_correlation(matrix: Array) -> float:
    """R_K = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2)), 0 where the root is 0.

    c right among s examples, p_k predicted as class k, t_k truly of it (Gorodkin, 2004); with two classes Matthews'
    correlation coefficient. The classes' order does not matter; -1 is reached with two classes alone.
    """
    counts = matrix.astype(float)
    predicted, truly, examples = counts.sum(axis=0), counts.sum(axis=1), counts.sum()
    covariance = np.trace(counts) * examples - predicted @ truly
    root = np.sqrt(examples**2 - predicted @ predicted) * np.sqrt(examples**2 - truly @ truly)
    return float(covariance / root) if root > 0 else 0.0


def per_class_scores(matrix: Array, labels: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of examples of each class."""
    hits, predicted, truly = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    rows = zip(*precision_recall_f1(hits, predicted, truly), truly, strict=True)
    return {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for label, (p, r, f, n) in zip(labels, rows, strict=True)
    }


def probability_scores(probabilities: Array, truth: Array) -> dict[str, float | None]:
    """Log loss, AUROC, average precision, Brier score and calibration error.

    probabilities: (examples, classes), rows summing to 1; truth: (examples,) class indices. A score that these
    examples do not define is None, as are all where a probability is NaN.
    """
    if np.isnan(probabilities).any():
        return dict.fromkeys(("loss", "auroc", "average_precision", "brier", "ece"))
    return {
        "loss": log_loss(probabilities, truth),
        "auroc": area_under_roc(probabilities, truth),
        "average_precision": mean_average_precision(probabilities, truth),
        "brier": brier_score(probabilities, truth),
        "ece": calibration_error(probabilities, truth),
    }


def log_loss(probabilities: Array, truth: Array) -> float:
    """mean of -ln p[truth], in nats; probabilities below 1e-12 count as 1e-12."""
    likelihood = probabilities[np.arange(len(truth)), truth].astype(float)
    return float(-np.log(np.clip(likelihood, LEAST_PROBABILITY, None)).mean())


def area_under_roc(probabilities: Array, truth: Array) -> float | None:
    """AUROC of the second class of two; of more, the mean over classes of one class against the rest.

    The mean runs over the classes that occur in truth, each weighing the same (scikit-learn's multi_class="ovr",
    average="macro"). None when a single class occurs.
    """
    return _of_classes(auroc, probabilities, truth)


def mean_average_precision(probabilities: Array, truth: Array) -> float | None:
    """Average precision of the second class of two; of more, the mean over the classes that occur in truth."""
    return _of_classes(average_precision, probabilities, truth)


def brier_score(probabilities: Array, truth: Array) -> float:
    """mean over examples of sum_k (p_k - [k = truth])^2, from 0 to 2 (Brier, 1950).

    With two classes it is twice the squared error of the second class's probability.
    """
    wanted = truth[:, None] == np.arange(probabilities.shape[1])
    return float(((probabilities.astype(float) - wanted) ** 2).sum(axis=1).mean())


def reliability(probabilities: Array, truth: Array, bins: int = 15) -> Array:
    """(bins, 5): lower and upper bound of the confidence, examples, mean confidence, accuracy.

    The confidence is the probability of the predicted class; bin m holds ((m - 1) / bins, m / bins]. Confidence and
    accuracy of an empty bin are 0.
    """
    confidence, right = probabilities.max(axis=1).astype(float), probabilities.argmax(axis=1) == truth
    edges = np.linspace(0, 1, bins + 1)
    chosen = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    examples = np.bincount(chosen, minlength=bins)
    sums = [np.bincount(chosen, weights=values, minlength=bins) for values in (confidence, right)]
    return np.column_stack([edges[:-1], edges[1:], examples, *(total / np.maximum(examples, 1) for total in sums)])


def calibration_error(probabilities: Array, truth: Array, bins: int = 15) -> float:
    """ECE = sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)| over equal-width bins (1706.04599, section 2)."""
    _, _, examples, confidence, accuracy = reliability(probabilities, truth, bins).T
    return float((examples * np.abs(accuracy - confidence)).sum() / len(truth))


def _of_classes(score: Ranking, probabilities: Array, truth: Array) -> float | None:
    classes = probabilities.shape[1]
    first = 1 if classes == 2 else 0
    occurs = (truth[:, None] == np.arange(classes))[:, first:]
    return mean_or_none(of_columns(score, probabilities[:, first:], occurs))
