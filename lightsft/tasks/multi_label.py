"""Multi-label classification: any number of labels per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row, require_columns
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.multilabel import multilabel_per_class, multilabel_scores
from lightsft.tasks.base import Array, Feature, Metrics
from lightsft.tasks.labelled import MOST_LABELS, in_order, require_weights
from lightsft.tasks.predicting import Said, shares
from lightsft.tasks.text_task import TextTask
from lightsft.tasks.texts import PAIR, TEXT, text_problems


@dataclass(frozen=True, kw_only=True)
class MultiLabel(TextTask):
    """-(w_c y log p + (1 - y) log(1 - p)) over examples and classes, their mean; p = sigmoid(logit), y in {0, 1}.

    label: a column of lists, or of texts that `separator` divides; an empty cell is an example without a label.
    positive_weights: w, one per class, or "balanced" in `for_rows`: examples without the class / examples with it.
    threshold: the probability from which on a label is predicted.
    """

    label: str = "labels"
    labels: tuple[str, ...] = ()
    separator: str = ","
    threshold: float = 0.5
    positive_weights: tuple[float, ...] | Literal["balanced"] | None = None

    name: ClassVar[str] = "multi-label"
    metric: ClassVar[str] = "micro_f1"
    metric_names: ClassVar[tuple[str, ...]] = (
        "micro_f1", "macro_f1", "samples_f1", "micro_precision", "micro_recall", "macro_precision", "macro_recall",
        "subset_accuracy", "hamming_loss", "auroc", "average_precision", "loss",
    )  # fmt: skip
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "hamming_loss"})
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "text": TEXT,
        "text_pair": PAIR,
        "label": ColumnKind(("labels", "label", "tags", "topics", "categories", "genres", "emotions"), "labels"),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise DataError(f"the labels are {', '.join(self.labels)}", expected="at least two different labels")
        if not 0 < self.threshold < 1:
            raise ConfigurationError(f"threshold={self.threshold}", expected="a probability between 0 and 1")
        require_weights("positive_weights", self.positive_weights, len(self.labels))
        if self.positive_weights is not None:
            object.__setattr__(self, "positive_weights", tuple(map(float, self.positive_weights)))

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """Columns by name and content, labels as they occur."""
        options = {**cls.found_columns(rows, source, options), **options}
        require_columns(rows, [options["label"]], source)
        separator = options.get("separator", ",")
        listed = [split_labels(row.get(options["label"]), separator) for row in rows]
        if options.get("labels") is None:
            found = {label for labels in listed for label in labels}
            if len(found) > MOST_LABELS:
                raise DataError(f"{source}: {len(found)} different labels", expected=f"at most {MOST_LABELS}")
            options["labels"] = in_order(found)
        if options.get("positive_weights") == "balanced":
            with_it = [sum(str(label) in labels for labels in listed) for label in options["labels"]]
            options["positive_weights"] = tuple(max(1, len(rows) - n) / max(1, n) for n in with_it)
        return cls(**options)

    # ---- rows

    def classes(self, row: Row) -> tuple[str, ...]:
        """Every label of the row."""
        return split_labels(row.get(self.label), self.separator)

    def problems(self, row: Row) -> Iterator[Problem]:
        """Empty texts, unknown labels."""
        yield from text_problems(row, self.text_columns)
        unknown = [label for label in self.classes(row) if label not in self.labels]
        if unknown:
            yield Problem(
                "unknown_label",
                f"has the label {unknown[0]!r}",
                expected=f"some of {', '.join(map(repr, self.labels))}",
                todo="correct the row, name all labels with --labels, or the separator of labels in a text",
            )

    def target(self, row: Row) -> list[float]:
        """0 or 1 for each class."""
        given = set(self.classes(row))
        return [float(label in given) for label in self.labels]

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """Texts are padded; labels have one width."""
        batch = super().collate([{**f, "labels": 0} for f in features], tokenizer)
        return {**batch, "labels": torch.tensor([feature["labels"] for feature in features])}

    # ---- loss and scores

    def items(self, labels: Tensor) -> Tensor:
        """Examples times classes."""
        return torch.tensor(labels.numel(), device=labels.device)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The formula above, in fp32."""
        weights = None if self.positive_weights is None else torch.tensor(self.positive_weights, device=labels.device)
        total = binary_cross_entropy_with_logits(outputs.logits.float(), labels, pos_weight=weights, reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, 2 classes): probabilities, then the truth."""
        return torch.cat([outputs.logits.float().sigmoid(), labels], dim=1)

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{"labels", "probabilities": {label: p}}: those of at least the threshold, and all."""
        found = shares(self.labels, outputs.logits.float().sigmoid())
        return [{"labels": [n for n in p if p[n] >= self.threshold], "probabilities": p} for p in found]

    def metrics(self, outcomes: Array) -> Metrics:
        """F1 in three averages, subset accuracy, Hamming loss, AUROC, average precision, per class."""
        found: Metrics = multilabel_scores(outcomes, self.threshold)
        found["loss"] = _log_loss(outcomes)
        return found | {"per_class": multilabel_per_class(outcomes, list(self.labels), self.threshold)}

    def score(self, outcomes: Array, metric: str) -> float:
        """Without the scores of each class."""
        if metric == "loss":
            return _log_loss(outcomes)
        found = multilabel_scores(outcomes, self.threshold)[metric]
        return float("nan") if found is None else found

    def answers_in(self, outcomes: Array) -> list[str]:
        """The labels of at least the threshold."""
        chosen = np.hsplit(outcomes, 2)[0] >= self.threshold
        return [", ".join(label for label, there in zip(self.labels, row, strict=True) if there) for row in chosen]

    @property
    def label_weights(self) -> tuple[float, ...] | None:
        """Of the examples with each class, over those without it."""
        return None if self.positive_weights is None else tuple(map(float, self.positive_weights))

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array:
        """Every class with its share of `train` as probability."""
        return np.column_stack([np.tile(self.truth(train).mean(axis=0), (len(rows), 1)), self.truth(rows)])


def split_labels(cell: Any, separator: str) -> tuple[str, ...]:
    """A list of labels, or a text of them."""
    if cell is None:
        return ()
    parts = cell if isinstance(cell, list | tuple) else str(cell).split(separator)
    return tuple(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))


def _log_loss(outcomes: Array) -> float:
    """The mean binary cross-entropy, without weights."""
    probabilities, truth = np.split(np.clip(outcomes, 0, 1), 2, axis=1)
    likelihood = np.where(truth > 0.5, probabilities, 1 - probabilities)
    return float(-np.log(np.clip(likelihood, 1e-12, None)).mean())
