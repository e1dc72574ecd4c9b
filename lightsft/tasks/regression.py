"""Regression and similarity: a number per text, or per pair of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError
from lightsft.metrics.regression import regression_scores
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.predicting import Said
from lightsft.tasks.texts import PAIR, TEXT, encode_texts, joined, text_problems


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """(prediction - number)^2, its mean. The numbers are learned as they are: bring large ones to the order of one.

    text, text_pair, label: columns; label holds the number. labels: what the one output is called. max_length: in
    tokens.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "score"
    labels: tuple[str, ...] = ("value",)
    max_length: int = 128

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "pearson"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "rmse", "mae", "r2", "loss")
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "rmse", "mae"})
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "text": TEXT,
        "text_pair": PAIR,
        "label": ColumnKind(("score", "label", "value", "similarity", "rating", "number", "target", "stars"), "number"),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        if len(self.labels) != 1:
            raise ConfigurationError(f"labels={list(self.labels)}", expected="one name, of the one output")

    @classmethod
    def of_labels(cls, labels: Sequence[str], **options: Any) -> Self:
        """The checkpoint's name for its output."""
        return cls(labels=tuple(labels)[:1] or ("value",), **options)

    def text_of(self, row: Row) -> str:
        """Both texts."""
        return joined(row, self.text_columns)

    @property
    def compares_nearly(self) -> bool:
        """Not pairs: many may share one of the texts."""
        return self.text_pair is None

    def inputs(self, row: Row, tokenizer: Any = None) -> list[tuple[str, ...]]:
        """A text or a pair."""
        return [tuple(str(row[column]) for column in self.text_columns)]

    def problems(self, row: Row) -> Iterator[Problem]:
        """Empty texts, what is no number."""
        yield from text_problems(row, self.text_columns)
        if number_of(row.get(self.label)) is None:
            yield Problem(
                "no_number",
                f"has {row.get(self.label)!r} in {self.label!r}",
                expected="a finite number in every row",
                todo="correct the row",
            )

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Token ids, cut to max_length, and the number."""
        encoded = encode_texts(rows, self.text_columns, tokenizer, self.max_length)
        numbers = [number_of(row.get(self.label)) for row in rows]
        return [
            {**f, "labels": math.nan if number is None else number} for f, number in zip(encoded, numbers, strict=True)
        ]

    def target_of(self, row: Row) -> str:
        """The number."""
        return str(number_of(row.get(self.label)))

    @property
    def text_columns(self) -> list[str]:
        """One column, or two."""
        return [self.text] + ([self.text_pair] if self.text_pair else [])

    def items(self, labels: Tensor) -> Tensor:
        """The examples."""
        return torch.tensor(labels.shape[0], device=labels.device)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The mean squared error, in fp32."""
        total = mse_loss(outputs.logits.float()[:, 0], labels.float(), reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, 2): prediction and truth."""
        return torch.stack([outputs.logits.float()[:, 0], labels.float()], dim=1)

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{"value"}."""
        return [{"value": float(value)} for value in outputs.logits[:, 0]]

    def metrics(self, outcomes: Array) -> Metrics:
        """Pearson, Spearman, RMSE, MAE, R^2."""
        found: Metrics = regression_scores(outcomes)
        return found | {"loss": float(((outcomes[:, 0] - outcomes[:, 1]) ** 2).mean())}

    def baseline(self, train: Sequence[Row], rows: Sequence[Row]) -> Metrics:
        """Always the mean of `train`."""
        mean = np.mean([number_of(row[self.label]) for row in train])
        return self.metrics(np.array([[mean, number_of(row[self.label])] for row in rows]))


def number_of(cell: Any) -> float | None:
    """A cell as a finite number."""
    try:
        number = float(str(cell).strip()) if not isinstance(cell, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def whole_number(cell: Any) -> int | None:
    """A cell as a whole number; 1.0 is one, since columns with gaps are read as floating point."""
    number = number_of(cell)
    return None if number is None or number != int(number) else int(number)
