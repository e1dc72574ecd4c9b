"""What belongs together in a batch, and how far up it is found among all rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightsft.metrics.retrieval import DEPTH, ranks
from lightsft.tasks.base import Array


def loss_of_labels(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Sum over rows i of the mean over j of the same label of -log softmax_{k != i}(v_i.v_k / t)[j] (2004.11362).

    vectors: (batch, width) unit vectors; labels: (batch,). A row that is alone with its label adds nothing.
    """
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    likelihood = (vectors @ vectors.T / temperature).masked_fill(own, -torch.inf).log_softmax(dim=1)
    same = (labels[:, None] == labels[None, :]) & ~own
    found: Tensor = -torch.where(same, likelihood, 0.0).sum(1) / same.sum(1).clamp_min(1)
    return found.sum()


def groups(texts: Sequence[Sequence[str]]) -> list[int]:
    """A number for each row: the same for rows that share a text, also by way of other rows."""
    first: dict[str, int] = {}
    parents = list(range(len(texts)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    for number, row in enumerate(texts):
        for text in row:
            parents[root(number)] = root(first.setdefault(text, number))
    return [root(number) for number in range(len(texts))]


def ranks_of_pairs(vectors: Array, texts: Sequence[Sequence[str]]) -> Array:
    """(rows, k) ranks of the texts that belong to each row's first text, among all other texts of all rows.

    vectors: (rows, texts, width). Rows with the same first text share what belongs to it; equal texts count as one.
    """
    places: dict[str, int] = {}
    documents: list[Array] = []
    belongs: dict[str, list[int]] = {}
    for row, (first, right, *wrong) in zip(vectors, texts, strict=True):
        for vector, text in zip(row[1:], (right, *wrong), strict=True):
            if text not in places:
                places[text] = len(documents)
                documents.append(vector)
        belongs.setdefault(first, []).append(places[right])
    return ranks(vectors[:, 0], np.array(documents), [belongs[first] for first, *_ in texts])


def ranks_of_labels(vectors: Array, labels: Array) -> Array:
    """(rows, DEPTH) ranks of the nearest texts of the same label among all others; NaN for a label that is alone."""
    found = np.full((len(labels), DEPTH), np.nan)
    rows = [np.flatnonzero(labels == label) for label in labels]
    some = np.array([number for number, row in enumerate(rows) if len(row) > 1], dtype=int)
    if len(some):
        best = ranks(vectors[some], vectors, [rows[number] for number in some], excluded=some)
        found[some, : best.shape[1]] = best
    return found
