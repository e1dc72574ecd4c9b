"""What every task answers: which rows it needs, how they become tensors, the loss, and the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from lightsft.data.reading import Row

Metrics = dict[str, Any]


class Task(ABC):
    """Rows -> features -> batches -> loss and per-example outcomes -> metrics.

    Outcomes are a small array per example, (examples, width): enough to compute every metric again later, on any
    resample of the examples. They are what is stored, not the logits.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # the default score
    metric_names: ClassVar[tuple[str, ...]]  # the scores that may decide
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})

    def greater_is_better(self, metric: str) -> bool:
        """Whether more of this score is better."""
        return metric not in self.lower_is_better

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings needed to predict later; `task(**describe())` is this task again."""

    @abstractmethod
    def key(self, row: Row) -> str:
        """The text that decides which split a row belongs to."""

    @abstractmethod
    def check(self, rows: Sequence[Row], source: str) -> None:
        """Raise DataError naming the row for what cannot be trained on."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        """Token features, one dict per row, with "labels"."""

    @abstractmethod
    def collate(self, features: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """A padded batch."""

    @abstractmethod
    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Summed loss over the batch divided by `num_items_in_batch` (by its own items when None), in fp32."""

    @abstractmethod
    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(batch, width) in fp32: what happened for each example."""

    @abstractmethod
    def metrics(self, outcomes: np.ndarray[Any, Any]) -> Metrics:
        """Every metric of these examples by name."""

    def baseline(self, train: Sequence[Row], rows: Sequence[Row]) -> Metrics | None:
        """Metrics of the best constant answer, or None where there is no such thing."""
        return None

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The first example as it is trained on: pieces of text, each with whether it carries loss."""
        return []
