"""Low-rank changes of a weight, made some rows at a time: what is written of them is the same in memory and from disk.

    W' = W + B A                            LoRA (2106.09685) with s B for B, PiSSA; a pair for each expert
    W' = W + L_b B L_d A                    VeRA (2310.11454), whose B and A are those of many weights
    W' = m V / ||V||,  V = W + B A          DoRA (2402.09353), the norm of each row

W (rows, columns) or (experts, rows, columns), B (rows, rank), A (rank, columns), m and b (rows), d (rank). Arithmetic
is in fp32 with one rounding to the type of W. Tiles have the same size wherever they are computed, so the results are
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 2**16  # numbers that are computed at once: 256 KiB in fp32, which stay in a core's cache


@dataclass(frozen=True)
class LowRank:
    """The factors of one weight. Those of a stored transpose are given transposed: (A^T, B^T)."""

    b: Tensor
    a: Tensor
    magnitude: Tensor | None = None
    row_factors: Tensor | None = None  # b
    rank_factors: Tensor | None = None  # d

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, or matrices, that it changes."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def matrices(self) -> Sequence[LowRank]:
        """One for each matrix."""
        if self.b.ndim == 2:
            return (self,)
        magnitudes = self.magnitude if self.magnitude is not None else [None] * len(self.b)
        assert self.row_factors is None
        assert self.rank_factors is None
        return [LowRank(b, a, m) for b, a, m in zip(self.b, self.a, magnitudes, strict=True)]

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """W' in fp32 of `weight`, these rows of one matrix in any type."""
        changed = self.product(rows).add_(weight)
        if self.magnitude is None:
            return changed
        lengths: Tensor = torch.linalg.norm(changed, dim=1)
        return changed.mul_((self.magnitude[rows] / lengths)[:, None])

    def product(self, rows: slice) -> Tensor:
        """B A of these rows, in the type of the factors (fp32)."""
        return torch.mm(self._left(rows, self.a.dtype), self.a)

    def _left(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """B of these rows, or L_b B L_d."""
        left = self.b[rows].to(dtype)
        if self.row_factors is not None:
            left = left * self.row_factors[rows, None].to(dtype)
        return left if self.rank_factors is None else left * self.rank_factors.to(dtype)

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The same in fp64, and the size of the terms that it is the sum of."""
        b, a, before = self._left(rows, torch.float64), self.a.double(), weight.double()
        changed, reach = before + b @ a, before.abs() + b.abs() @ a.abs()
        if self.magnitude is None:
            return changed, reach
        scale = self.magnitude[rows].double()[:, None] / changed.norm(dim=1, keepdim=True)
        return changed * scale, reach * scale.abs()


def rows_in_tile(columns: int) -> int:
    """As many whole rows as make TILE numbers, at least one."""
    return max(1, TILE // max(1, columns))


def tiles(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix, a tile at a time."""
    step = rows_in_tile(columns)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@torch.no_grad()
def rewrite(weight: Tensor, change: LowRank) -> None:
    """W <- round(W'), in place. More than two dimensions (a convolution's) count as (out, everything else)."""
    stacked = weight if change.b.ndim == 3 else weight[None]
    for matrix, own in zip(stacked, change.matrices(), strict=True):
        flat = matrix.flatten(1)
        for rows in tiles(*flat.shape):
            flat[rows] = own.change(flat[rows], rows).to(flat.dtype)
        if flat.data_ptr() != matrix.data_ptr():  # a layout of memory that has no flat view
            matrix.copy_(flat.view(matrix.shape))


def rewritten(weight: Tensor, change: LowRank) -> Tensor:
    """W' in fp32."""
    result = weight.detach().float().clone()
    rewrite(result, change)
    return result
