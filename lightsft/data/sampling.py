"""Rows that stand for a source larger than memory: evenly spaced ones, and every one that brings something new."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightsft.data.parts import Numbered, Row

MOST_ROWS = 10_000  # evenly spaced
MOST_VALUES = 1000  # of a column; one with more is no label
LONGEST_VALUE = 200  # characters


def representative(rows: Iterable[Numbered], separator: str = ",") -> list[Row]:
    """All rows of up to MOST_ROWS, of more a part that shows the same columns and the same labels, in their order.

    Evenly spaced: every row, and each time MOST_ROWS are held, every second of them stays and half as many follow.
    Besides, of each column, a row for each of its first MOST_VALUES values (the elements of a list, the parts of a text
    between separators): whatever takes few values, as labels and tags do, is seen with all of them. One pass;
    held are at most MOST_ROWS rows and MOST_VALUES for each column.
    """
    even: dict[int, Row] = {}
    new: dict[int, Row] = {}
    known: dict[str, set[str]] = {}
    parts, step = re.compile(rf"\s*{re.escape(separator)}\s*"), 1
    readable = (one.row for one in rows if one.row is not None)
    for number, row in enumerate(readable):
        if _brings_new(row, known, parts):
            new[number] = row
        if number % step == 0:
            even[number] = row
            if len(even) > MOST_ROWS:
                step *= 2
                even = {place: kept for place, kept in even.items() if place % step == 0}
    both = even | new
    return [both[number] for number in sorted(both)]


def _brings_new(row: Row, known: dict[str, set[str]], parts: re.Pattern[str]) -> bool:
    """Whether a column has a value that it had in no row before; `known` is brought up to date."""
    new = False
    for column, cell in row.items():
        values = known.setdefault(column, set())
        if len(values) < MOST_VALUES:
            before = len(values)
            values.update(_values(cell, parts))
            new |= len(values) > before
    return new


def _values(cell: Any, parts: re.Pattern[str]) -> Iterator[str]:
    if isinstance(cell, str):
        if len(cell) <= LONGEST_VALUE:
            yield from parts.split(cell)
    elif isinstance(cell, Mapping):
        for value in cell.values():
            yield from _values(value, parts)
    elif isinstance(cell, list | tuple):
        yield "no element" if not cell else ""
        for value in cell:
            yield from _values(value, parts)
    elif isinstance(cell, int | float | None):
        yield str(cell)
