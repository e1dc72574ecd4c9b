"""Rows of two splits that are not the same, but share what a split made by lightsft would keep together.

Questions about one context, conversations that open with one question: 16 bytes a row, of tasks that have such a thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from lightsft.doctor.collect import Collector, Seen
from lightsft.doctor.duplicates import evened, in_earlier_split
from lightsft.doctor.findings import Finding, plural
from lightsft.doctor.row_index import RowIndex


class SharedKeys(Collector):
    """Of the rows that can be used. `what` they share, in a word or two."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._index = RowIndex()
        self._keys, self._examples = bytearray(), bytearray()  # 8 bytes a row

    def see(self, row: Seen) -> None:
        """Hash the key and the whole example."""
        if row.usable and row.key.strip():
            self._index.add(row)
            for text, hashes in ((row.key, self._keys), (row.compared, self._examples)):
                hashes += blake2b(evened(text, text.encode("utf-8", "surrogatepass")), digest_size=8).digest()

    def findings(self) -> Iterator[Finding]:
        """Rows whose key is in an earlier split; a row that is there as a whole is leakage, and said as such."""
        keys, examples = (np.frombuffer(hashes, dtype="<u8") for hashes in (self._keys, self._examples))
        rows = np.flatnonzero(in_earlier_split(keys, self._index) & ~in_earlier_split(examples, self._index))
        if len(rows):
            first = int(np.flatnonzero(keys == keys[rows[0]])[0])
            tally = self._index.tally(rows, self._index.name([first, int(rows[0])]))
            where = " and ".join(tally.rows)
            title = f"{plural(tally.count, 'row')} of {where} with a {self._what} that is in an earlier split too"
            action = "scores these rows as if all of them were new"
            fix = f"keep rows of one {self._what} in one split, as lightsft does where it splits"
            yield tally.finding("shared_key", "warning", title, action=action, fix=fix)
