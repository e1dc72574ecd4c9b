"""How far up a search finds what is relevant: ranks by cosine, recall@k, MRR, nDCG@10.

Outcomes are (queries, relevant): the ranks, from 1, of each query's most similar relevant documents in order, filled
up with 0 where a query has fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightsft.errors import DataError
from lightsft.metrics.arrays import Array

Relevant = Sequence[int] | Sequence[Sequence[int]] | Sequence[Array] | Array
DEPTH = 10  # of nDCG; a relevant document beyond this many better relevant ones changes no score here
TIE = 1e-9  # cosines no further apart are equal: the same vectors give products that differ in the last bits
BLOCK = 2**22  # cosines in memory at a time, 32 MiB


def ranks(
    queries: Array,
    documents: Array,
    relevant: Relevant,
    excluded: Sequence[int] | Array | None = None,
    block: int = BLOCK,
) -> Array:
    """(n, k) ranks of the relevant documents by cosine, k at most 10: the i-th best stands behind i - 1 relevant ones.

    queries: (n, d), documents: (m, d). relevant: the index of one document per query, or of several. excluded: a
    document per query that is not searched, itself for instance; -1 for none. The rank of the i-th is i + the number
    of others whose cosine is not lower: of equal ones the irrelevant come first, so that a collapsed model scores what
    it deserves. A cosine that is not a number counts as the lowest; a zero vector has cosine 0 with everything.
    Memory: `block` cosines, and the vectors in fp64.
    """
    hidden = np.full(len(queries), -1) if excluded is None else np.asarray(excluded)
    rows = _rows(relevant, hidden, len(documents))
    searched = _unit(queries), _unit(documents)
    scores = _best_scores(*searched, rows)
    others = np.zeros(scores.shape)
    width = max(1, min(len(documents), block))
    height = max(1, block // width)
    for top in range(0, len(queries), height):
        part = slice(top, top + height)
        for left in range(0, len(documents), width):
            cosines = _cosines(searched[0][part], searched[1][left : left + width])
            _hide(cosines, rows[part], hidden[part], left)
            for column in range(scores.shape[1]):
                least = scores[part, column, None] - TIE
                others[part, column] += (cosines >= least).sum(axis=1)
    found: Array = np.where(np.isnan(scores), 0, others + np.arange(1, scores.shape[1] + 1))
    return found


def retrieval_scores(outcomes: Array) -> dict[str, float | None]:
    """recall@1, @5, @10, MRR and nDCG@10 of (queries, relevant) ranks.

    recall@k is the share of queries with a relevant document among the first k; MRR the mean of 1 / rank of the first.
    nDCG@10 is the mean of sum 1 / log2(1 + rank) over relevant documents among the first 10, divided by that sum if
    they came first (Järvelin and Kekäläinen, 2002, gains of 0 and 1). None without a query.
    """
    if not len(outcomes):
        return dict.fromkeys(("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"))
    found = outcomes.astype(float)
    first = found[:, 0]
    present = found > 0
    gains = np.where(present & (found <= DEPTH), 1 / np.log2(1 + np.maximum(found, 1)), 0).sum(axis=1)
    best = np.where(present, 1 / np.log2(2 + np.arange(found.shape[1])), 0).sum(axis=1)
    return {
        **{f"recall@{k}": float((first <= k).mean()) for k in (1, 5, 10)},
        "mrr": float((1 / first).mean()),
        "ndcg@10": float((gains / best).mean()),
    }


def _rows(relevant: Relevant, excluded: Array, documents: int) -> list[Array]:
    """The relevant documents of each query that are searched, checked."""
    given = (np.unique(np.atleast_1d(np.asarray(row, dtype=int))) for row in relevant)
    rows = [row[row != hidden] for row, hidden in zip(given, excluded, strict=True)]
    for number, row in enumerate(rows, 1):
        if not len(row):
            raise DataError(f"query {number} has no relevant document", expected="at least one for every query")
        if row[0] < 0 or row[-1] >= documents:
            raise DataError(
                f"query {number} calls {row.tolist()} relevant", expected=f"indices from 0 to {documents - 1}"
            )
    return rows


def _unit(vectors: Array) -> Array:
    """Rows of length 1 in fp64; zero stays zero."""
    wide = vectors.astype(float)
    with np.errstate(invalid="ignore", over="ignore"):
        wide /= np.maximum(np.abs(wide).max(axis=1, initial=0, keepdims=True), np.finfo(float).tiny)
        wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(float).tiny)
    return wide


def _cosines(queries: Array, documents: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        found: Array = queries @ documents.T
    found[np.isnan(found)] = -np.inf
    return found


def _best_scores(queries: Array, documents: Array, rows: list[Array]) -> Array:
    """(n, k) cosines of the relevant documents, highest first, NaN where there are fewer."""
    scores = np.full((len(rows), min(DEPTH, max(map(len, rows), default=1))), np.nan)
    for number, row in enumerate(rows):
        best = np.sort(_cosines(queries[number : number + 1], documents[row])[0])[::-1][:DEPTH]
        scores[number, : len(best)] = best
    return scores


def _hide(cosines: Array, rows: list[Array], excluded: Array, left: int) -> None:
    """NaN, which is not above anything, for the relevant and the excluded document of each query in a block."""
    end = left + cosines.shape[1]
    for number, (row, own) in enumerate(zip(rows, excluded, strict=True)):
        hidden = np.append(row, own)
        cosines[number, hidden[(hidden >= left) & (hidden < end)] - left] = np.nan
