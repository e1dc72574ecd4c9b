"""Sequence classification: one label per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.tasks.base import Feature
from lightsft.tasks.labelled import LABEL, Labelled
from lightsft.tasks.texts import PAIR, TEXT, encode_texts, joined, text_problems


@dataclass(frozen=True, kw_only=True)
class Classification(Labelled):
    """Cross-entropy over `labels`, with class weights, focal loss or label smoothing; the score is the accuracy.

    text, text_pair: columns. max_length: in tokens; longer texts are cut, as is what exceeds the tokenizer's limit.
    """

    text: str = "text"
    text_pair: str | None = None
    max_length: int = 128

    name: ClassVar[str] = "classification"
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "text": TEXT,
        "text_pair": PAIR,
        "label": LABEL,
    }

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
        """Empty texts, unknown labels."""
        yield from text_problems(row, self.text_columns)
        yield from self.label_problems(row)

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Token ids, cut to max_length, and the label's index."""
        encoded = encode_texts(rows, self.text_columns, tokenizer, self.max_length)
        return [{**feature, "labels": self.index(row)} for feature, row in zip(encoded, rows, strict=True)]

    @property
    def text_columns(self) -> list[str]:
        """One column, or two."""
        return [self.text] + ([self.text_pair] if self.text_pair else [])
