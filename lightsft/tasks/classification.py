"""Sequence classification: one label per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.tasks.labelled import LABEL, Labelled
from lightsft.tasks.text_task import TextTask
from lightsft.tasks.texts import PAIR, TEXT, text_problems


@dataclass(frozen=True, kw_only=True)
class Classification(TextTask, Labelled):
    """Cross-entropy over `labels`, with class weights, focal loss or label smoothing; the score is the accuracy."""

    name: ClassVar[str] = "classification"
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "text": TEXT,
        "text_pair": PAIR,
        "label": LABEL,
    }

    def problems(self, row: Row) -> Iterator[Problem]:
        """Empty texts, unknown labels."""
        yield from text_problems(row, self.text_columns)
        yield from self.label_problems(row)

    def target(self, row: Row) -> int:
        """The label's index."""
        return self.index(row)
