"""Tasks that read one text, or a pair of texts, as a whole: classification, several labels, numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightsft.data.reading import Row
from lightsft.tasks.base import Array, Feature, Task
from lightsft.tasks.texts import encode_texts, joined


@dataclass(frozen=True, kw_only=True)
class TextTask(Task, ABC):
    """text, text_pair: columns. max_length: in tokens; longer texts are cut, as is what exceeds the tokenizer's own."""

    text: str = "text"
    text_pair: str | None = None
    max_length: int = 128

    @abstractmethod
    def target(self, row: Row) -> Any:
        """What the head is to say of a row, as numbers."""

    @property
    def text_columns(self) -> list[str]:
        """One column, or two."""
        return [self.text] + ([self.text_pair] if self.text_pair else [])

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

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Token ids, cut to max_length, and the target."""
        encoded = encode_texts(rows, self.text_columns, tokenizer, self.max_length)
        return [{**feature, "labels": self.target(row)} for feature, row in zip(encoded, rows, strict=True)]

    def truth(self, rows: Sequence[Row]) -> Array:
        """The targets."""
        return np.array([self.target(row) for row in rows])
