"""One label per example, whatever the example is: the loss, the outcomes and the scores of a classifier."""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightsft.data.batching import IGNORED
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.classification import (
    LEAST_PROBABILITY,
    classification_scores,
    confusion_matrix,
    per_class_scores,
    probability_scores,
)
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.predicting import Said, shares
from lightsft.tasks.texts import empty, filled

MOST_LABELS = 1000
BALANCED = "balanced"
LABEL = ColumnKind(("label", "labels", "class", "category", "target", "sentiment", "intent"), "label")


@dataclass(frozen=True, kw_only=True)
class Labelled(Task, ABC):
    """-w_y (1 - p_y)^gamma log p_y of the true label y, summed, over the sum of w_y; p = softmax(logits).

    label: its column. labels: the classes, in the head's order. class_weights: w, one per class, or "balanced" in
    `for_rows`: examples / (classes x examples of the class). focal_gamma: gamma, 0 for cross-entropy (1708.02002).
    label_smoothing: the share of the target spread evenly over the classes (1512.00567); not beside focal_gamma.
    """

    label: str = "label"
    labels: tuple[str, ...] = ()
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0

    metric: ClassVar[str] = "accuracy"
    metric_names: ClassVar[tuple[str, ...]] = (
        "accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1", "mcc", "auroc", "average_precision",
        "ece", "brier", "loss",
    )  # fmt: skip
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "brier", "ece"})
    without_unit: ClassVar[frozenset[str]] = frozenset({"loss", "brier", "mcc"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise DataError(f"the labels are {', '.join(self.labels)}", expected="at least two different labels")
        require_weights("class_weights", self.class_weights, len(self.labels))
        if self.class_weights is not None:
            object.__setattr__(self, "class_weights", tuple(map(float, self.class_weights)))
        if self.focal_gamma < 0 or not 0 <= self.label_smoothing < 1 or (self.focal_gamma and self.label_smoothing):
            raise ConfigurationError(
                f"focal_gamma={self.focal_gamma} and label_smoothing={self.label_smoothing}",
                expected="focal_gamma of at least 0 or label_smoothing in [0, 1), not both",
            )

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """Columns by name and content, labels as they occur, balanced weights by their counts."""
        if options.get("label") in rows[0] and options.get("labels") is None:  # a wrong label column is said first
            options["labels"] = labels_of(rows, options["label"], source)
        options = {**cls.found_columns(rows, source, options), **options}
        label = options["label"]
        if options.get("labels") is None:
            options["labels"] = labels_of(rows, label, source)
        if options.get("class_weights") == BALANCED:
            options["class_weights"] = balanced(rows, label, [str(name) for name in options["labels"]])
        return cls(**options)

    def classes(self, row: Row) -> tuple[str, ...]:
        """The label."""
        return (str(row[self.label]),) if filled(row, self.label) else ()

    def label_problems(self, row: Row) -> Iterator[Problem]:
        """No label, or one that the head has no output for."""
        if not filled(row, self.label):
            yield empty(self.label, "a label in every row")
        elif isinstance(row[self.label], list | tuple):
            yield Problem(
                "several_labels",
                f"has a list of labels in {self.label!r}",
                expected="one label per row",
                todo="take --task multi-label",
            )
        elif str(row[self.label]) not in self.labels:
            yield Problem(
                "unknown_label",
                f"has the label {str(row[self.label])!r}",
                expected=f"one of {', '.join(map(repr, self.labels))}",
                todo="correct the row, or name all labels with --labels",
            )

    def index(self, row: Row) -> int:
        """The number of a row's label, -1 where it has none."""
        return self.labels.index(str(row[self.label])) if str(row.get(self.label)) in self.labels else -1

    # ---- loss

    def items(self, labels: Tensor) -> Tensor:
        """The sum of the labels' weights; their number where all are equal."""
        weights = self._weights(labels)
        return labels.ne(IGNORED).sum() if weights is None else weights[labels].sum()

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The formula above, in fp32."""
        logits, weights = outputs.logits.float(), self._weights(labels)
        if self.focal_gamma:
            likelihood = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            others = (-likelihood.expm1()).clamp_min(torch.finfo(likelihood.dtype).tiny)  # 0 ** gamma has no gradient
            losses = -(others**self.focal_gamma) * likelihood
            total = losses.sum() if weights is None else (losses * weights[labels]).sum()
        else:
            total = cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def _weights(self, labels: Tensor) -> Tensor | None:
        return None if self.class_weights is None else torch.tensor(self.class_weights, device=labels.device)

    # ---- scores

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, classes + 1): the probabilities, then the true label's index."""
        return torch.cat([outputs.logits.float().softmax(-1), labels[:, None].float()], dim=1)

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{"label", "probabilities": {label: p}}; probabilities sum to 1."""
        found = shares(self.labels, outputs.logits.float().softmax(-1))
        return [{"label": max(p, key=p.__getitem__), "probabilities": p} for p in found]

    def metrics(self, outcomes: Array) -> Metrics:
        """Scores of the labels and of the probabilities, the confusion matrix, and the scores of each class."""
        probabilities, truth, matrix = self._read(outcomes)
        return {
            **classification_scores(matrix),
            **probability_scores(probabilities, truth),
            "confusion_matrix": matrix.tolist(),
            "per_class": per_class_scores(matrix, list(self.labels)),
        }

    def score(self, outcomes: Array, metric: str) -> float:
        """Of the probabilities only where one of their scores is asked for."""
        probabilities, truth, matrix = self._read(outcomes)
        found = classification_scores(matrix)
        value = found[metric] if metric in found else probability_scores(probabilities, truth)[metric]
        return float("nan") if value is None else float(value)

    def _read(self, outcomes: Array) -> tuple[Array, Array, Array]:
        probabilities, truth = self.class_probabilities(outcomes)
        return probabilities, truth, confusion_matrix(truth, probabilities.argmax(axis=1), len(self.labels))

    def scores_of_each(self, outcomes: Array, metric: str) -> Array:
        """Accuracy and loss of all rows at once; the others one by one."""
        probabilities, truth = self.class_probabilities(outcomes)
        if metric == "accuracy":
            return np.array(probabilities.argmax(axis=1) == truth, dtype=float)
        if metric == "loss":
            likelihood = probabilities[np.arange(len(truth)), truth].astype(float)
            return np.array(-np.log(np.clip(likelihood, LEAST_PROBABILITY, None)))
        return super().scores_of_each(outcomes, metric)

    def answers_in(self, outcomes: Array) -> list[str]:
        """The most probable label."""
        return [self.labels[index] for index in outcomes[:, :-1].argmax(axis=1)]

    def class_probabilities(self, outcomes: Array) -> tuple[Array, Array]:
        """As they are stored."""
        return outcomes[:, :-1], outcomes[:, -1].astype(int)

    # ---- without the model

    def truth(self, rows: Sequence[Row]) -> Array:
        """The labels' indices."""
        return np.array([self.index(row) for row in rows])

    @property
    def label_weights(self) -> tuple[float, ...] | None:
        """The classes' weights."""
        return None if self.class_weights is None else tuple(map(float, self.class_weights))

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array:
        """Always the most frequent label of `train`, with its label shares as probabilities."""
        counts = Counter(str(row[self.label]) for row in train)
        shares = np.array([counts[label] / len(train) for label in self.labels])
        return np.column_stack([np.tile(shares, (len(rows), 1)), self.truth(rows)])


def labels_of(rows: Sequence[Row], column: str, source: str) -> tuple[str, ...]:
    """The labels that occur, sorted; numbers in numeric order."""
    found = {str(row[column]) for row in rows if filled(row, column) and not isinstance(row[column], list | tuple)}
    if len(found) > max(2, min(MOST_LABELS, len(rows) // 2)):
        raise DataError(
            f"{source}: the column {column!r} holds {len(found)} different values in {len(rows)} rows",
            expected="a label column with a limited number of classes",
            todo="name the right column with --label",
        )
    if len(found) < 2:
        raise DataError(
            f"{source}: the column {column!r} holds "
            + (f"one value, {next(iter(found))!r}, in all rows" if found else "no single values"),
            expected="a label column with at least two classes",
            todo="name the right column with --label, or take --task multi-label for lists of labels",
        )
    return in_order(found)


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted; numbers first, in numeric order."""
    return tuple(sorted(labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)))


def balanced(rows: Sequence[Row], column: str, labels: Sequence[str]) -> tuple[float, ...]:
    """examples / (classes x examples of the class): the weights with which every class counts the same in all."""
    counts = Counter(str(row[column]) for row in rows if filled(row, column))
    missing = [label for label in labels if not counts[label]]
    if missing:
        raise DataError(
            f"no row has the label {missing[0]!r}",
            expected="rows of every label, to weigh the classes by",
            todo="leave class_weights out, or give one number per class",
        )
    known = sum(counts[label] for label in labels)
    return tuple(known / (len(labels) * counts[label]) for label in labels)


def require_weights(name: str, weights: Any, classes: int) -> None:
    """Raise ConfigurationError unless these are positive numbers, one per class, or None."""
    if weights is None:
        return
    if isinstance(weights, str):
        raise ConfigurationError(
            f"{name}={weights!r} without rows to count", expected="the task's for_rows(rows, ...), or numbers"
        )
    if len(weights) != classes or min(weights) <= 0:
        raise ConfigurationError(f"{name}={list(weights)}", expected=f"{classes} positive numbers, one per class")
