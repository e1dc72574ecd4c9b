"""Rows by a running index over all splits: 4 bytes each, and the beginnings of the first few thousand texts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from lightsft.doctor.collect import Seen, Tally
from lightsft.doctor.findings import FIRST_ROWS
from lightsft.doctor.samples import excerpt
from lightsft.doctor.shingles import Array

REMEMBERED, CHARACTERS = 5000, 120


class RowIndex:
    """Rows are added split by split."""

    def __init__(self) -> None:
        self.splits: list[str] = []
        self._starts: list[int] = []
        self._numbers = array("I")
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, row: Seen) -> int:
        """The index of a new row."""
        if not self.splits or self.splits[-1] != row.split:
            self.splits.append(row.split)
            self._starts.append(len(self._numbers))
        self._numbers.append(row.number)
        if len(self._texts) < REMEMBERED:
            self._texts.append(row.text[:CHARACTERS])
        return len(self._numbers) - 1

    def split_of(self, rows: Array) -> Array:
        """The place in `splits` of each row."""
        places: Array = np.searchsorted(np.array(self._starts), rows, side="right") - 1
        return places

    def tally(self, rows: Array, sample: str = "") -> Tally:
        """Rows in ascending order as a tally."""
        tally = Tally()
        tally.count, tally.sample = len(rows), sample
        splits = self.split_of(rows)
        for place in np.unique(splits):
            first = rows[splits == place][:FIRST_ROWS]
            tally.rows[self.splits[place]] = [self._numbers[row] for row in first]
        return tally

    def name(self, rows: Sequence[int]) -> str:
        """`rows 3 and 17 of train: the text`; the text where it is remembered."""
        named = [(self.splits[int(self.split_of(np.array([row]))[0])], self._numbers[row]) for row in rows]
        if len({split for split, _ in named}) == 1:
            where = f"rows {' and '.join(str(number) for _, number in named)} of {named[0][0]}"
        else:
            where = " and ".join(f"row {number} of {split}" for split, number in named)
        text = next((self._texts[row] for row in rows if row < len(self._texts)), "")
        return f"{where}: {excerpt(text)}" if text else where
