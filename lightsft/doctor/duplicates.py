"""Texts that occur more than once: repeated, leaking from one split into another, or labelled in two ways.

Texts are compared without case and with spacing evened out, by 64-bit hashes: 20 bytes a row. A chance meeting of two
hashes is expected once in 6 billion rows.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from lightsft.doctor.collect import Collector, Seen
from lightsft.doctor.findings import Finding, percent, plural
from lightsft.doctor.near import near_duplicates
from lightsft.doctor.row_index import RowIndex
from lightsft.doctor.shingle_store import ShingleStore
from lightsft.doctor.shingles import FEWEST_WORDS, Array, words_of

BATCH_TEXTS, BATCH_BYTES = 1000, 500_000
DOMINANT_SHARE, DOMINANT_ROWS = 0.05, 20


class Duplicates(Collector):
    """Of the rows that can be used, by what they have to share. `what` is that, in a word; nearly: by words as well."""

    def __init__(self, store: ShingleStore | None = None, *, what: str = "text", nearly: bool = True) -> None:
        self._what, self._nearly = what, nearly
        self._index = RowIndex()
        self._hashes = bytearray()  # 8 bytes a row: without case and spacing
        self._letters = array("I")  # to the letter
        self._classes = array("I")
        self._store = store or ShingleStore()
        self._rows: list[int] = []
        self._texts: list[bytes] = []
        self._bytes = 0
        self._compared = 0

    def see(self, row: Seen) -> None:
        """Hash the text and its labels; queue its words for the shingles."""
        if not row.usable or not row.compared.strip():
            return
        index = self._index.add(row)
        data = row.data if row.compared is row.text else row.compared.encode("utf-8", "surrogatepass")
        self._hashes += blake2b(evened(row.compared, data), digest_size=8).digest()
        self._letters.append(zlib.crc32(data))
        self._classes.append(zlib.crc32("\x1f".join(sorted(set(row.classes))).encode("utf-8", "surrogatepass")))
        if self._nearly:
            self._queue(index, words_of(row.compared, data))

    def _queue(self, index: int, words: list[bytes]) -> None:
        if len(words) >= FEWEST_WORDS:
            text = b" ".join(words)
            self._rows.append(index)
            self._texts.append(text)
            self._bytes += len(text)
            if len(self._rows) >= BATCH_TEXTS or self._bytes >= BATCH_BYTES:
                self._flush()

    def findings(self) -> Iterator[Finding]:
        """Exact ones, then near ones."""
        if not len(self._index):
            return
        self._flush()
        hashes = np.frombuffer(self._hashes, dtype="<u8")
        yield from self._exact(hashes)
        self._compared = self._store.texts
        yield from near_duplicates(self._index, hashes, self._store)

    def figures(self) -> dict[str, Any]:
        """How many texts were compared for near-duplicates."""
        return {"texts_compared_for_near_duplicates": self._compared} if self._nearly else {}

    def not_checked(self) -> Iterator[str]:
        """Near-duplicates in large data are looked for in a share of the texts; none where rows share long ones."""
        if not self._nearly and self._what == "text":
            yield "near-duplicates: several rows may share one of their texts"
        elif self._store.one_in > 1:
            yield (
                f"near-duplicates: 1 in {self._store.one_in} texts ({self._compared:,}) was compared, chosen "
                f"{self._store.chosen_by}"
            )

    def _flush(self) -> None:
        if self._rows:
            self._store.add(self._rows, self._texts)
        self._rows, self._texts, self._bytes = [], [], 0

    def _exact(self, hashes: Array) -> Iterator[Finding]:
        repeated = _repeated(hashes, self._index)
        if not len(repeated.rows):
            return
        conflicting = _differ(np.frombuffer(self._classes, dtype=np.uint32), repeated)
        dominant = repeated.sizes >= max(DOMINANT_ROWS, DOMINANT_SHARE * len(hashes))
        leaked = _leaked(repeated)
        again = np.zeros(len(repeated.rows), dtype=bool)
        again[1:] = (repeated.group[1:] == repeated.group[:-1]) & (repeated.split[1:] == repeated.split[:-1])
        yield from self._conflicts(repeated, conflicting)
        yield from self._leaks(repeated, leaked)
        yield from self._dominant(repeated, dominant & ~conflicting, len(hashes))
        yield from self._repeats(repeated, again & ~(conflicting | dominant)[repeated.group])

    def _conflicts(self, repeated: _Repeated, groups: Array) -> Iterator[Finding]:
        rows, chosen = repeated.rows, groups[repeated.group]
        if chosen.any():
            group = repeated.group[_first(rows, chosen)]
            tally = self._index.tally(np.sort(rows[chosen]), self._pair(repeated, group, self._classes))
            title = f"{plural(int(groups.sum()), self._what)} with different labels, in {plural(tally.count, 'row')}"
            fix = "decide on one label for each, or remove these rows: no model can be right about both"
            yield tally.finding("conflicting_labels", "warning", title, fix=fix)

    def _leaks(self, repeated: _Repeated, chosen: Array) -> Iterator[Finding]:
        if chosen.any():
            place = _first(repeated.rows, chosen)
            pair = [repeated.rows[repeated.starts[repeated.group[place]]], repeated.rows[place]]
            tally = self._index.tally(np.sort(repeated.rows[chosen]), self._index.name(pair))
            where = " and ".join(tally.rows)
            title = f"{plural(tally.count, 'row')} of {where} with a {self._what} that is in an earlier split too"
            action = "scores these rows as if they were new: the score comes out too high"
            fix = f"remove them from one of the splits, or let lightsft split: it keeps equal {self._what}s together"
            yield tally.finding("leakage", "warning", title, action=action, fix=fix)

    def _dominant(self, repeated: _Repeated, groups: Array, total: int) -> Iterator[Finding]:
        for group in np.flatnonzero(groups)[np.argsort(-repeated.sizes[groups], kind="stable")][:5]:
            rows = repeated.rows[repeated.group == group]
            tally = self._index.tally(rows, self._index.name(rows[:2].tolist()))
            title = f"one {self._what} makes up {percent(tally.count, total)} of the rows ({tally.count:,})"
            yield tally.finding("dominant_text", "warning", title, fix="keep it once, or a few times")

    def _repeats(self, repeated: _Repeated, chosen: Array) -> Iterator[Finding]:
        if chosen.any():
            place = _first(repeated.rows, chosen)
            tally = self._index.tally(
                np.sort(repeated.rows[chosen]), self._index.name(repeated.rows[place - 1 : place + 1].tolist())
            )
            letters = np.frombuffer(self._letters, dtype=np.uint32)[repeated.rows]
            exact = _seen_before(repeated, letters, chosen)
            how = f" ({exact:,} to the letter, {tally.count - exact:,} apart from case and spacing)"
            title = f"{plural(tally.count, 'row')} with the {self._what} of an earlier row" + how * (
                self._what == "text"
            )
            fix = "keep one of each, unless a text is meant to count several times"
            yield tally.finding("duplicate", "warning", title, action="trains on them each time", fix=fix)

    def _pair(self, repeated: _Repeated, group: int, values: array[int]) -> str:
        """The first row of a group, and the first that has another value."""
        rows = repeated.rows[repeated.group == group]
        other = next(row for row in rows if values[row] != values[rows[0]])
        return self._index.name([rows[0], other])


class _Repeated(NamedTuple):
    """Rows whose hash occurs more than once, sorted by hash, then by row: (members,) and (groups,)."""

    rows: Array
    group: Array  # (members,)
    split: Array  # (members,)
    starts: Array  # (groups,) the first member of each
    sizes: Array  # (groups,)


def _repeated(hashes: Array, index: RowIndex) -> _Repeated:
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    member = np.zeros(len(hashes), dtype=bool)
    member[1:] |= same
    member[:-1] |= same
    begins = np.ones(len(hashes), dtype=bool)
    begins[1:] = ~same
    rows, begins = order[member], begins[member]
    starts = np.flatnonzero(begins)
    sizes = np.diff(np.concatenate([starts, [len(rows)]]))
    return _Repeated(rows, np.cumsum(begins) - 1, index.split_of(rows), starts, sizes)


def _leaked(repeated: _Repeated) -> Array:
    """(members,) whether the first of its group is in another split."""
    leaked: Array = repeated.split != repeated.split[repeated.starts][repeated.group]
    return leaked


def in_earlier_split(hashes: Array, index: RowIndex) -> Array:
    """(rows,) whether the hash of a row is that of one in an earlier split."""
    there = np.zeros(len(hashes), dtype=bool)
    if len(hashes):
        repeated = _repeated(hashes, index)
        there[repeated.rows[_leaked(repeated)]] = True
    return there


def _differ(values: Array, repeated: _Repeated) -> Array:
    """(groups,) whether the rows of a group have different values."""
    own = values[repeated.rows]
    different: Array = np.minimum.reduceat(own, repeated.starts) != np.maximum.reduceat(own, repeated.starts)
    return different


def _first(rows: Array, chosen: Array) -> int:
    """The place of the smallest of the chosen rows."""
    places = np.flatnonzero(chosen)
    return int(places[np.argmin(rows[places])])


def _seen_before(repeated: _Repeated, letters: Array, chosen: Array) -> int:
    """How many of the chosen members are equal to the letter to another member before them in their split."""
    order = np.lexsort((repeated.rows, letters, repeated.split, repeated.group))
    keys = np.stack([repeated.group[order], repeated.split[order], letters[order].astype(np.int64)])
    again = (keys[:, 1:] == keys[:, :-1]).all(axis=0)
    return int((again & chosen[order[1:]]).sum())


def evened(text: str, data: bytes) -> bytes:
    """Without case, with a single space between words; `data` is its UTF-8."""
    if len(data) == len(text):
        return b" ".join(data.lower().split())
    return " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")
