"""Rows that stand for a source larger than memory: evenly spaced ones, and every one that brings something new."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightsft.data.parts import Numbered, Row

MOST_ROWS, MOST_BYTES = 10_000, 64_000_000  # evenly spaced
MOST_VALUES = 1000  # of a column; one with more is no label
LONGEST_VALUE = 200  # characters


def representative(rows: Iterable[Numbered], separator: str = ",") -> list[Row]:
    """All rows of up to MOST_ROWS, of more a part that shows the same columns and the same labels, in their order.

    Evenly spaced: every row, and each time MOST_ROWS are held, every second of them stays and half as many follow.
    Besides, of each column, a row for each of its first MOST_VALUES values (the elements of a list, the parts of a text
    between separators), without its longer texts: whatever takes few values, as labels and tags do, is seen with all of
    them. One pass; held are at most MOST_ROWS rows of MOST_BYTES in the file, and MOST_VALUES short ones per column.
    """
    even = _Even()
    new: dict[int, Row] = {}
    known: dict[str, set[str]] = {}
    parts, position = re.compile(rf"\s*{re.escape(separator)}\s*"), 0
    for number, one in enumerate(one for one in rows if one.row is not None):
        row = one.row or {}
        if _brings_new(row, known, parts):
            new[number] = {name: cell for name, cell in row.items() if not _is_long(cell)}
        even.add(number, row, one.position - position)
        position = one.position
    both = new | even.rows
    return [both[number] for number in sorted(both)]


class _Even:
    """Every `step`-th row; the first always."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self._sizes: dict[int, int] = {}
        self._bytes, self._step = 0, 1

    def add(self, number: int, row: Row, size: int) -> None:
        """Hold a row if it is its turn; where there are too many, half of them go."""
        if number % self._step:
            return
        self.rows[number], self._sizes[number] = row, size
        self._bytes += size
        while len(self.rows) > MOST_ROWS or (self._bytes > MOST_BYTES and len(self.rows) > 1):
            self._step *= 2
            for place in [place for place in self.rows if place % self._step]:
                del self.rows[place]
                self._bytes -= self._sizes.pop(place)


def _is_long(cell: Any) -> bool:
    return isinstance(cell, str) and len(cell) > LONGEST_VALUE


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
        if not _is_long(cell):
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
