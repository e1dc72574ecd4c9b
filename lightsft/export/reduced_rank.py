"""Linear regression of a chosen rank, from sums alone, so that memory does not grow with the rows.

    min over B (out, r), A (r, in) of   sum |t - B A x|^2 + ridge |B A|^2
    G = sum x x^T (in, in),   C = sum t x^T (out, in),   M = G + ridge I,   D = C M^-1

    B = the leading eigenvectors of D C^T (out, out),   A = B^T D

Without a limit of the rank the solution is D. Any other matrix costs |(B A - D) M^1/2|^2 more, so the best of rank r is
the truncated singular value decomposition of D M^1/2, whose left vectors are those eigenvectors (Izenman, 1975). All in
fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean of G's diagonal
NOTHING = 1e-10  # of the largest eigenvalue: what is left of a direction that is not there


class Sums:
    """G, C and sum |t|^2 of rows x (in) and t (out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.g = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.c = torch.zeros(outputs, inputs, dtype=torch.float64)
        self.t, self.rows = 0.0, 0

    def add(self, x: Tensor, t: Tensor) -> None:
        """Rows x (n, in) and t (n, out)."""
        x, t = x.double().cpu(), t.double().cpu()
        self.g.addmm_(x.T, x)
        self.c.addmm_(t.T, x)
        self.t += float(t.square().sum())
        self.rows += len(x)

    def error(self, b: Tensor, a: Tensor) -> float:
        """The sum of |t - B A x|^2."""
        d = b @ a
        return max(0.0, self.t - 2 * float((self.c * d).sum()) + float(((d @ self.g) * d).sum()))

    def with_others(self, other: Sums) -> Sums:
        """Of the rows of both."""
        both = Sums(self.g.shape[0], self.c.shape[0])
        both.g, both.c = self.g + other.g, self.c + other.c
        both.t, both.rows = self.t + other.t, self.rows + other.rows
        return both


@dataclass(frozen=True)
class Regression:
    """B (out, r) and A (r, in) in fp64, r may be 0; sums of |t|^2 and of the error over the held rows."""

    b: Tensor
    a: Tensor
    ridge: float
    held: float
    error: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a)


def reduced_rank(sums: Sums, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """B and A of at most this rank; `ridge` is a share of the mean of G's diagonal."""
    size = len(sums.g)
    m = sums.g + ridge * sums.g.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    factor, wrong = torch.linalg.cholesky_ex(m)
    if int(wrong) or not math.isfinite(float(m.sum())):  # no rows, or inputs of zeros
        return sums.c.new_zeros(len(sums.c), 0), sums.c.new_zeros(0, size)
    d = torch.cholesky_solve(sums.c.T, factor).T
    values, vectors = torch.linalg.eigh(d @ sums.c.T)
    kept = int((values[-rank:] > NOTHING * values[-1].clamp(min=0)).sum())
    b = vectors[:, len(values) - kept :]
    return b, b.T @ d


def chosen(fit: Sums, held: Sums, rank: int, ridges: Sequence[float] = RIDGES) -> Regression:
    """The regression on all rows, with the ridge under which one on `fit` does best on `held`.

    Of rank 0 if none does better there than to change nothing.
    """
    tried = [(held.error(*reduced_rank(fit, rank, ridge)), ridge) for ridge in ridges]
    error, ridge = min(tried)
    if error >= held.t:
        none = reduced_rank(Sums(len(fit.g), len(fit.c)), rank, ridge)
        return Regression(*none, ridge, held.t, held.t)
    return Regression(*reduced_rank(fit.with_others(held), rank, ridge), ridge, held.t, error)
