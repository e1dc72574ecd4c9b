"""The shingle sets of as many texts as fit: all of them, or a share that shrinks by half whenever room runs out.

A text is kept by the hash of its smallest shingle hash. Two texts with Jaccard J share that one with probability J, so
near-duplicates stay or go together, and 1 in 8 texts hold about J/8 of all pairs, not 1/64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lightsft.doctor.shingles import Array, mix, shingle_sets

MOST_TEXTS, MOST_SHINGLES = 200_000, 12_000_000  # 4 bytes each


@dataclass(frozen=True)
class Block:
    """Texts of one batch: their row (index among all rows), key in [0, 2^32), and shingles with offsets."""

    rows: Array
    keys: Array
    values: Array
    offsets: Array

    def below(self, limit: int) -> Block:
        """Those with a smaller key."""
        kept = self.keys < limit
        sizes = np.diff(self.offsets)
        return Block(
            self.rows[kept],
            self.keys[kept],
            self.values[np.repeat(kept, sizes)],
            np.concatenate([[0], np.cumsum(sizes[kept])]),
        )


class ShingleStore:
    """`one_in` is 1 while all texts are kept, then 2, 4, ..."""

    def __init__(self, most_texts: int = MOST_TEXTS, most_shingles: int = MOST_SHINGLES) -> None:
        self.one_in = 1
        self.texts = self.shingles = 0
        self._most_texts, self._most_shingles = most_texts, most_shingles
        self._blocks: list[Block] = []
        self._by_row = False

    @property
    def chosen_by(self) -> str:
        """How the texts were chosen, and what that means for what is found."""
        if self._by_row:
            return (
                "by their row, since most begin alike: of near-duplicates in twos few are found, of large groups some"
            )
        return "by a hash that near-duplicates mostly share: about as large a share of them is found"

    def add(self, rows: list[int], texts: list[bytes]) -> None:
        """Keep the texts that are chosen; `rows` are numbers that the caller knows them by, ascending."""
        values, offsets = shingle_sets(texts)
        numbers = np.array(rows, dtype=np.uint32)
        keys = _keys(numbers if self._by_row else values[offsets[:-1]])
        self._blocks.append(Block(numbers, keys, values, offsets).below(2**32 // self.one_in))
        self._count(self._blocks[-1:])
        while self.texts > self._most_texts or self.shingles > self._most_shingles:
            self._halve()

    def _halve(self) -> None:
        """Texts that share most of their words share their keys too, and would all go at once: then rows decide."""
        limit = 2**32 // self.one_in
        self.one_in *= 2
        halves = [block.below(limit // 2) for block in self._blocks]
        if not self._by_row and sum(len(block.rows) for block in halves) < self.texts / 8:
            self._by_row = True
            halves = [replace(block, keys=_keys(block.rows) % limit).below(limit // 2) for block in self._blocks]
        self._blocks, self.texts, self.shingles = halves, 0, 0
        self._count(halves)

    def taken(self) -> tuple[Array, Array, Array]:
        """Rows (texts,), shingles and offsets (texts + 1,) of all texts; the store is empty afterwards."""
        rows, values = np.empty(self.texts, np.int64), np.empty(self.shingles, np.uint32)
        sizes = np.empty(self.texts, np.int64)
        text = shingle = 0
        self._blocks.reverse()
        while self._blocks:  # each block is freed as it is copied
            block = self._blocks.pop()
            here = slice(text, text + len(block.rows))
            rows[here], sizes[here] = block.rows, np.diff(block.offsets)
            values[shingle : shingle + len(block.values)] = block.values
            text, shingle = here.stop, shingle + len(block.values)
        return rows, values, np.concatenate([[0], np.cumsum(sizes)])

    def _count(self, blocks: list[Block]) -> None:
        self.texts += sum(len(block.rows) for block in blocks)
        self.shingles += sum(len(block.values) for block in blocks)


def _keys(values: Array) -> Array:
    """(texts,) in [0, 2^32), spread evenly."""
    return mix(values.astype(np.uint64)) >> np.uint64(32)
