"""Columns of text, as every task for single texts or pairs of them reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row

if TYPE_CHECKING:
    from lightsft.tasks.base import Feature

TEXT = ColumnKind(
    ("text", "sentence", "sentence1", "premise", "question1", "text1", "text_a", "content", "review", "tweet"), "text"
)
PAIR = ColumnKind(
    ("text_pair", "sentence2", "hypothesis", "question2", "text2", "text_b"), "text", optional=True, second_of="text"
)


def joined(row: Row, columns: Sequence[str]) -> str:
    """The texts of a row, a line each."""
    return "\n".join(str(row[column]) for column in columns)


def text_problems(row: Row, columns: Sequence[str]) -> Iterator[Problem]:
    """Cells without text."""
    for column in columns:
        if not filled(row, column):
            yield empty(column, "a text in every row")


def encode_texts(rows: Sequence[Row], columns: Sequence[str], tokenizer: Any, max_length: int) -> list[Feature]:
    """Token ids of one or two texts, cut to `max_length` and to the tokenizer's own limit (the longer text first)."""
    texts = [[str(row[column]) for row in rows] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=min(max_length, tokenizer.model_max_length))
    return [{name: values[i] for name, values in encoded.items()} for i in range(len(rows))]


def filled(row: Row, column: str) -> bool:
    """Whether there is something in it: data sets store what is missing as None."""
    return row.get(column) is not None and bool(str(row[column]).strip())


def empty(column: str, expected: str) -> Problem:
    """A cell without anything in it."""
    return Problem("empty_cell", f"has an empty {column!r}", expected=expected, todo="fill it, or remove the row")
