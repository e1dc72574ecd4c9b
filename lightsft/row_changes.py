"""What merging does to a stored tensor, some rows of it at a time; see also `lightsft.low_rank`.

A tensor is seen as one matrix (rows, columns), or several: a vector as (n, 1), a convolution's weight as (out,
everything else), an expert tensor as one matrix for each expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RowChange(Protocol):
    """What becomes of one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns) of the matrix, or with the number of matrices before."""
        ...

    def matrices(self) -> Sequence[RowChange]:
        """One for each matrix."""
        ...

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """The new values in fp32 of these rows of one matrix, which are given as stored."""
        ...

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The same in fp64, for any rows, and the size of the terms that they are the sum of."""
        ...


@dataclass(frozen=True)
class Values:
    """W' = V: other values of the same shape, whatever W was."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """As one matrix."""
        return as_matrix(self.values.shape)

    def matrices(self) -> Sequence[Values]:
        """Itself."""
        return (self,)

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """V."""
        return self.values.reshape(self.shape)[rows].float()

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """V."""
        values = self.values.reshape(self.shape)[rows].double()
        return values, values.abs()


@dataclass(frozen=True)
class Scaled:
    """W' = W * l, or W + W * (l - 1) where that is `near_one`: l has the shape of W, or 1 where a factor is shared."""

    shape: tuple[int, ...]
    factors: Tensor
    near_one: bool = False

    def matrices(self) -> Sequence[Scaled]:
        """One for each entry of a third dimension."""
        if len(self.shape) == 2:
            return (self,)
        each = self.factors.expand(self.shape[0], *self.factors.shape[1:])
        return [Scaled(self.shape[1:], factors, self.near_one) for factors in each]

    def _of(self, rows: slice) -> Tensor:
        return self.factors[rows] if len(self.factors) > 1 else self.factors

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """W * l."""
        wide, factors = weight.float(), self._of(rows)
        return torch.addcmul(wide, wide, factors - 1) if self.near_one else wide * factors

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """W * l; l - 1 is rounded where it is near 1, like l."""
        found = weight.double() * self._of(rows).double()
        return found, found.abs() + weight.double().abs()


@dataclass(frozen=True)
class Rows:
    """W'[id_k] = R_k for each of some rows (k), W'[id] = W[id] for every other; with more rows than W, all of those."""

    shape: tuple[int, int]
    ids: Tensor
    values: Tensor  # (k, columns)

    def matrices(self) -> Sequence[Rows]:
        """Itself."""
        return (self,)

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """W with R in its place."""
        return self._put(weight.to(torch.float32, copy=True), rows)

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The same."""
        found = self._put(weight.to(torch.float64, copy=True), rows)
        return found, found.abs()

    def _put(self, found: Tensor, rows: slice) -> Tensor:
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        found[self.ids[inside] - rows.start] = self.values.reshape(-1, self.shape[1])[inside].to(found.dtype)
        return found


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns): the first dimension, and all others."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])
