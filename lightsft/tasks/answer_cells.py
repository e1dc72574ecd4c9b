"""Answers as data sets store them: SQuAD's mapping, lists, or one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightsft.data.reading import Row
from lightsft.tasks.regression import whole_number
from lightsft.tasks.texts import filled


class Answer(NamedTuple):
    """A text, and where it begins in the context; -1 where nobody said."""

    text: str
    start: int


def answers_of(row: Row, column: str) -> list[Answer]:
    """The answers of a row in any of the forms in use; none for a question without one."""
    cell = row.get(column)
    if isinstance(cell, Mapping):
        texts, starts = _listed(cell.get("text")), _listed(cell.get("answer_start"))
        places = [*starts, *[None] * len(texts)][: len(texts)]
        return [_answer(text, start) for text, start in zip(texts, places, strict=True) if text not in (None, "")]
    if isinstance(cell, list | tuple):
        return [answer for part in cell for answer in answers_of({column: part}, column)]
    return [_answer(cell, row.get("answer_start"))] if filled(row, column) else []


def _listed(cell: Any) -> list[Any]:
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _answer(text: Any, start: Any) -> Answer:
    """An answer, with -1 for a place that is no number."""
    number = whole_number(start)
    return Answer(str(text), -1 if number is None else number)


def characters_of(found: Sequence[Answer], context: str) -> tuple[int, int] | None:
    """Characters [start, end) of the first answer, without the blanks around it."""
    if not found:
        return None
    text = found[0].text
    start = found[0].start if found[0].start >= 0 else context.find(text)
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())
