"""Sequence classification: one label per text, or per pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightsft.data.batching import pad_features
from lightsft.data.reading import Row, require_columns
from lightsft.errors import DataError
from lightsft.tasks.base import Metrics, Task
from lightsft.tasks.metrics import classification_scores, confusion_matrix, per_class_scores

MOST_LABELS = 1000


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over `labels`; the score is the accuracy.

    text, text_pair, label: columns. labels: the classes, in the head's order. max_length: in tokens; longer texts
    are cut, as is what exceeds the tokenizer's own limit.
    """

    labels: tuple[str, ...]
    text: str = "text"
    label: str = "label"
    text_pair: str | None = None
    max_length: int = 128

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    metric_names: ClassVar[tuple[str, ...]] = (
        "accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1", "loss",
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise DataError(f"the labels are {', '.join(self.labels)}", expected="at least two different labels")

    def describe(self) -> dict[str, Any]:
        """The fields, and the task's name."""
        return {"name": self.name, **asdict(self), "labels": list(self.labels)}

    def key(self, row: Row) -> str:
        """Both texts."""
        return "\n".join(str(row[column]) for column in self._text_columns())

    def check(self, rows: Sequence[Row], source: str) -> None:
        """Columns, empty texts, unknown labels."""
        require_columns(rows, [*self._text_columns(), self.label], source)
        known = set(self.labels)
        for number, row in enumerate(rows, 1):
            for column in (*self._text_columns(), self.label):
                if not _filled(row, column):
                    raise DataError(
                        f"{source}: row {number} has an empty {column!r}",
                        expected="a text and a label in every row",
                        todo="fill it, or remove the row",
                    )
            if str(row[self.label]) not in known:
                raise DataError(
                    f"{source}: row {number} has the label {str(row[self.label])!r}",
                    expected=f"one of {', '.join(map(repr, self.labels))}",
                    todo="correct the row, or name all labels with --labels",
                )

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        """Token ids, cut to max_length, and the label's index."""
        texts = [[str(row[column]) for row in rows] for column in self._text_columns()]
        encoded = tokenizer(*texts, truncation=True, max_length=min(self.max_length, tokenizer.model_max_length))
        index = {label: number for number, label in enumerate(self.labels)}
        return [
            {
                **{name: values[i] for name, values in encoded.items()},
                "labels": index.get(str(row.get(self.label)), -1),
            }
            for i, row in enumerate(rows)
        ]

    def collate(self, features: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the tokenizer's side."""
        return pad_features(features, tokenizer.pad_token_id, left=tokenizer.padding_side == "left")

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """-log softmax(logits)[label], in fp32."""
        total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else labels.shape[0])

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(batch, classes + 1): the probabilities, then the true label's index."""
        return torch.cat([logits.float().softmax(-1), labels[:, None].float()], dim=1)

    def metrics(self, outcomes: np.ndarray[Any, Any]) -> Metrics:
        """Accuracy, precision, recall, F1, loss, confusion matrix."""
        probabilities, truth = outcomes[:, :-1], outcomes[:, -1].astype(int)
        matrix = confusion_matrix(truth, probabilities.argmax(axis=1), len(self.labels))
        likelihood = np.clip(probabilities[np.arange(len(truth)), truth], 1e-12, None)
        return {
            **classification_scores(matrix),
            "loss": float(-np.log(likelihood).mean()),
            "confusion_matrix": matrix.tolist(),
            "per_class": per_class_scores(matrix, list(self.labels)),
        }

    def baseline(self, train: Sequence[Row], rows: Sequence[Row]) -> Metrics:
        """Always the most frequent label of `train`, with its label shares as probabilities."""
        counts = Counter(str(row[self.label]) for row in train)
        shares = np.array([counts[label] / len(train) for label in self.labels])
        truth = [self.labels.index(str(row[self.label])) for row in rows]
        return self.metrics(np.column_stack([np.tile(shares, (len(rows), 1)), truth]))

    def _text_columns(self) -> list[str]:
        return [self.text] + ([self.text_pair] if self.text_pair else [])


def labels_of(rows: Sequence[Row], column: str, source: str) -> tuple[str, ...]:
    """The labels that occur, sorted; numbers in numeric order."""
    require_columns(rows, [column], source)
    found = {str(row[column]) for row in rows if _filled(row, column)}
    if len(found) > max(2, min(MOST_LABELS, len(rows) // 2)):
        raise DataError(
            f"{source}: the column {column!r} holds {len(found)} different values in {len(rows)} rows",
            expected="a label column with a limited number of classes",
            todo="name the right column with --label",
        )
    return tuple(sorted(found, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)))


def _filled(row: Row, column: str) -> bool:
    """Whether there is something in it: data sets store what is missing as None."""
    return row.get(column) is not None and bool(str(row[column]).strip())
