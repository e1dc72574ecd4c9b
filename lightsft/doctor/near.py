"""Near-duplicates: texts whose sets of word triples overlap by Jaccard 0.8 or more, within a split and between two.

Min-hashes in BANDS bands of ROWS each (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4): two sets meet in
some band with probability 1 - (1 - J^4)^16, that is 0.9998 at J = 0.8. Those that meet are compared by the sets
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lightsft.doctor.findings import Finding, plural
from lightsft.doctor.row_index import RowIndex
from lightsft.doctor.shingle_store import ShingleStore
from lightsft.doctor.shingles import Array, band_hashes, jaccards

BANDS, ROWS = 16, 4
ALIKE = 0.8
MOST_COMPARISONS = 4_000_000


class _Pairs:
    """The first partner found for each text: (texts,) places, -1 where there is none."""

    def __init__(self, texts: int) -> None:
        self.within, self.between = np.full(texts, -1), np.full(texts, -1)
        self.comparisons = 0


def near_duplicates(index: RowIndex, hashes: Array, store: ShingleStore) -> Iterator[Finding]:
    """What is nearly the same, but not the same; a text that occurs several times stands for all of them."""
    if not store.texts:
        return
    compared, one_in = store.texts, store.one_in
    rows, values, offsets = store.taken()
    pairs = _search(values, offsets, np.sort(np.unique(hashes[rows], return_index=True)[1]), index.split_of(rows))
    bound = f" (1 in {one_in} texts looked at: {compared:,})" if one_in > 1 else ""
    if (places := np.flatnonzero(pairs.between >= 0)).size:
        tally = index.tally(rows[places], index.name([int(rows[pairs.between[places[0]]]), int(rows[places[0]])]))
        title = f"{plural(tally.count, 'row')} of {' and '.join(tally.rows)} nearly the same as one in an earlier split"
        action = "scores these rows as if they were new: the score comes out too high"
        fix = "remove them from one of the splits, or split by what they have in common (grouped)"
        yield tally.finding("near_leakage", "warning", title + bound, action=action, fix=fix)
    if (places := np.flatnonzero((pairs.within >= 0) & (pairs.between < 0))).size:
        tally = index.tally(rows[places], index.name([int(rows[pairs.within[places[0]]]), int(rows[places[0]])]))
        title = (
            f"{plural(tally.count, 'row')} nearly the same as an earlier one (word triples shared: {ALIKE:.0%} or more)"
        )
        fix = "keep one of each, unless these are meant to be variants"
        yield tally.finding("near_duplicate", "warning", title + bound, action="trains on each of them", fix=fix)


def _search(values: Array, offsets: Array, texts: Array, split: Array) -> _Pairs:
    """`texts`: places of the texts to compare, ascending; `split` of each place."""
    pairs = _Pairs(len(offsets) - 1)
    for band in range(BANDS):
        later, earlier = _meetings(band_hashes(values, offsets, band, ROWS)[texts], texts)
        found = np.where(split[later] == split[earlier], pairs.within[later], pairs.between[later])
        later, earlier = later[found < 0], earlier[found < 0]
        room = MOST_COMPARISONS - pairs.comparisons
        later, earlier = later[:room], earlier[:room]
        pairs.comparisons += len(later)
        if len(later):
            alike = jaccards(values, offsets, later, earlier) >= ALIKE
            _note(pairs, later[alike], earlier[alike], split)
    return pairs


def _note(pairs: _Pairs, later: Array, earlier: Array, split: Array) -> None:
    same = split[later] == split[earlier]
    pairs.within[later[same]] = earlier[same]
    pairs.between[later[~same]] = earlier[~same]


def _meetings(hashes: Array, texts: Array) -> tuple[Array, Array]:
    """Each text with the one before it, and with the first, of those with its hash."""
    order = np.argsort(hashes, kind="stable")
    same = np.concatenate([[False], hashes[order[1:]] == hashes[order[:-1]]])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    at = np.flatnonzero(same)
    further = at[first[at] != at - 1]
    later = np.concatenate([order[at], order[further]])
    earlier = np.concatenate([order[at - 1], order[first[further]]])
    return texts[later], texts[earlier]
