"""D_i, what one adapter changes of one matrix, and what TIES and DARE keep of it; see `lightsft.export.combining`."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightsft.low_rank import LowRank, rows_in_tile, tiles

_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of the terms' size: how far fp32 may be from what is exact
_LOW = 15  # bits of a magnitude that the second pass counts; the first counts the 16 above


class Exact(NamedTuple):
    """Values in fp64, the size of the terms that they are the sum of, and where fp32 may drop what is kept here."""

    values: Tensor
    reach: Tensor
    unsure: Tensor


class Delta(Protocol):
    """What one adapter changes of one matrix, or what is kept of that."""

    @property
    def factors(self) -> LowRank:
        """Those of the adapter."""
        ...

    def values(self, weight: Tensor, rows: slice) -> Tensor:
        """In fp32, new memory."""
        ...

    def exact(self, weight: Tensor, rows: slice) -> Exact:
        """The same in fp64, for any rows."""
        ...


def sparse(factors: LowRank, method: str, density: float, key: str) -> Delta:
    """What a method keeps of it; `key` is what the values that DARE drops depend on."""
    if density == 1:
        return _Whole(factors)
    return _Largest(factors, density) if method == "ties" else _Random(factors, density, key)


class _Whole:
    """D = B A, or W' - W where there is a magnitude."""

    def __init__(self, factors: LowRank) -> None:
        self.factors = factors

    def values(self, weight: Tensor, rows: slice) -> Tensor:
        if self.factors.magnitude is None:
            return self.factors.product(rows)
        return self.factors.change(weight, rows).sub_(weight)

    def exact(self, weight: Tensor, rows: slice) -> Exact:
        origin = (torch.zeros_like(weight) if self.factors.magnitude is None else weight).double()
        changed, reach = self.factors.exact(origin, rows)
        return Exact(changed - origin, reach + origin.abs(), torch.zeros_like(changed, dtype=torch.bool))


class _Largest(_Whole):
    """T(D): the values whose magnitude is at least the k-th largest, k = int(density * values), at least 1; else 0.

    All values that equal the k-th are kept, where torch.topk takes any of them: which ones are kept then does not
    depend on order, and D and -D have the same. Of B A alone: what DoRA changes depends on all of W.
    """

    def __init__(self, factors: LowRank, density: float) -> None:
        super().__init__(factors)
        self.count = max(1, int(density * math.prod(factors.shape)))
        self._lock = threading.Lock()
        self._threshold: float | None = None

    @property
    def threshold(self) -> float:
        """The k-th largest magnitude, found once: threads that need it meanwhile wait."""
        with self._lock:
            if self._threshold is None:
                self._threshold = kth_largest(self._tiles, self.count)
            return self._threshold

    def _tiles(self) -> Iterator[Tensor]:
        """D, a tile at a time: those of `change`, so that the bits are the same."""
        return (self.factors.product(rows) for rows in tiles(*self.factors.shape))

    def values(self, weight: Tensor, rows: slice) -> Tensor:
        values = super().values(weight, rows)
        return values.masked_fill_(values.abs() < self.threshold, 0)

    def exact(self, weight: Tensor, rows: slice) -> Exact:
        values, reach, _ = super().exact(weight, rows)
        above, slack = values.abs() - self.threshold, _ROUNDING * reach
        dropped = above < -slack
        return Exact(values.masked_fill(dropped, 0), reach.masked_fill(dropped, 0), above.abs() <= slack)


class _Random(_Whole):
    """R(D): each value dropped with probability 1 - density, or divided by `density`.

    The numbers are drawn for each tile of the matrix by a generator of its own, whose seed is a hash of `key` and the
    tile's number.
    """

    def __init__(self, factors: LowRank, density: float, key: str) -> None:
        super().__init__(factors)
        self.density, self.key = density, key

    def values(self, weight: Tensor, rows: slice) -> Tensor:
        return super().values(weight, rows).div_(self.density).masked_fill_(self._dropped(rows), 0)

    def exact(self, weight: Tensor, rows: slice) -> Exact:
        values, reach, unsure = super().exact(weight, rows)
        dropped = self._dropped(rows)
        return Exact(
            (values / self.density).masked_fill(dropped, 0), (reach / self.density).masked_fill(dropped, 0), unsure
        )

    def _dropped(self, rows: slice) -> Tensor:
        """Of these rows, any of the matrix."""
        step = rows_in_tile(self.factors.shape[1])
        first, last = rows.start // step, (rows.stop - 1) // step
        drawn = torch.cat([self._dropped_of_tile(number, step) for number in range(first, last + 1)])
        return drawn[rows.start - first * step : rows.stop - first * step]

    def _dropped_of_tile(self, number: int, step: int) -> Tensor:
        rows, columns = self.factors.shape
        digest = hashlib.blake2b(f"{number} {self.key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.rand(min(step, rows - number * step), columns, generator=generator) >= self.density


def kth_largest(parts: Callable[[], Iterator[Tensor]], k: int) -> float:
    """The k-th largest magnitude of fp32 values that come in parts, twice; exact, with half a megabyte.

    The bits of a magnitude, as a whole number, are in the order of the magnitudes: the first pass counts their upper 16
    and finds those of the k-th, the second counts the lower 15 of the values that have these.
    """
    upper = torch.zeros(2 ** (31 - _LOW), dtype=torch.int64)
    for part in parts():
        upper += torch.bincount(_bits(part) >> _LOW, minlength=len(upper))
    high, k = _bin_of(upper, k)
    lower = torch.zeros(2**_LOW, dtype=torch.int64)
    for part in parts():
        bits = _bits(part)
        lower += torch.bincount(bits[bits >> _LOW == high] & (2**_LOW - 1), minlength=len(lower))
    low, _ = _bin_of(lower, k)
    return torch.tensor(high << _LOW | low, dtype=torch.int32).view(torch.float32).item()


def _bits(values: Tensor) -> Tensor:
    return values.flatten().view(torch.int32) & 0x7FFFFFFF


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and which of its bin's values that is."""
    at_least = counts.flip(0).cumsum(0)  # values in this bin or a higher one, from the highest
    place = int(torch.searchsorted(at_least, k))
    number = len(counts) - 1 - place
    return number, k - int(at_least[place] - counts[number])
