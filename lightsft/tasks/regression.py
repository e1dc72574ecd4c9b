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
from lightsft.tasks.base import Array, Feature, Metrics
from lightsft.tasks.predicting import Said
from lightsft.tasks.text_task import TextTask
from lightsft.tasks.texts import PAIR, TEXT, text_problems


@dataclass(frozen=True, kw_only=True)
class Regression(TextTask):
    """(prediction - number)^2, its mean. The numbers are learned as they are: bring large ones to the order of one.

    label: the column with the number. labels: what the one output is called.
    """

    label: str = "score"
    labels: tuple[str, ...] = ("value",)

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "pearson"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "rmse", "mae", "r2", "loss")
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "rmse", "mae"})
    without_unit: ClassVar[frozenset[str]] = frozenset(metric_names)
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

    def target(self, row: Row) -> float:
        """The number; not a number where there is none."""
        number = number_of(row.get(self.label))
        return math.nan if number is None else number

    def target_of(self, row: Row) -> str:
        """The number."""
        return str(number_of(row.get(self.label)))

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

    def answers_in(self, outcomes: Array) -> list[str]:
        """The predicted numbers."""
        return [f"{value:.4g}" for value in outcomes[:, 0]]

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array:
        """Always the mean of `train`."""
        return np.column_stack([np.full(len(rows), self.truth(train).mean()), self.truth(rows)])


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
