"""Several adapters as one change of each stored tensor, made some rows at a time: task arithmetic, TIES and DARE.

    linear       W' = W + sum_i w_i D_i                            task arithmetic (2212.04089)
    ties         W' = W + mean of w_i T(D_i) that agree in sign    TIES (2306.01708), section 4
    dare_linear  W' = W + sum_i w_i R(D_i)                         DARE (2311.03099), section 3
    dare_ties    W' = W + mean of w_i R(D_i) that agree in sign    DARE, then TIES without its trimming

D_i = W'_i - W is what adapter i alone changes of this tensor: B A, or with DoRA what its formula makes of the stored W.
T keeps the `density` share of largest magnitude, R each value with probability `density`, divided by that.

Signs and means are those of PEFT's `merge_utils`, applied to D_i rather than to the factors: the sign of a value is
that of sum_i T(D_i) ("total") or of sum_i sign T(D_i) ("frequency"), without the weights, positive where that is 0; the
mean divides by how many agree, not by their weights. So TIES as published has weights of 1 (times its lambda), and
weights that sum to 1 make a smaller change than with `linear`. An adapter that does not change a tensor has D_i = 0
there: it has no sign and is not counted, and the weights of the others stay as they are.

Experts that are stored as a stack are combined one by one, as if each were a tensor of its own.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightsft.errors import ArtifactError, ConfigurationError
from lightsft.low_rank import LowRank, rows_in_tile, tiles
from lightsft.row_changes import RowChange

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
MAJORITIES = ("total", "frequency")
DENSITY = {
    "ties": 0.2,  # the paper's, and that of PEFT's guide
    "dare_linear": 0.5,  # mergekit's examples; what is dropped adds noise of (1 / density - 1) D^2 to every value
    "dare_ties": 0.5,
}
SHOWN = 12
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of the terms' size: how far fp32 may be from what is exact
_LOW = 15  # bits of a magnitude that the second pass counts; the first counts the 16 above


def combine(
    adapters: Sequence[Mapping[str, LowRank]],
    weights: Sequence[float],
    method: str = "linear",
    *,
    density: float | None = None,
    majority: str = "total",
    seed: int = 0,
) -> dict[str, RowChange]:
    """The change of each tensor that any of `adapters` changes, by name.

    density    share of the values that is kept, in (0, 1]; None for DENSITY of the method
    majority   how `ties` and `dare_ties` find the sign of a value: "total" mass or "frequency"
    seed       of what DARE drops, which depends on this, the tensor's name, the adapter's number and the place alone

    Raises ConfigurationError for options that cannot be used, ArtifactError for adapters that do not fit together.
    """
    _check_options(len(adapters), weights, method, density, majority)
    _check_shapes(adapters)
    if method == "ties":
        _check_no_magnitudes(adapters)
    together: _Together = _AgreeingMean(majority) if method.endswith("ties") else _Sum()
    share = 1.0 if method == "linear" else density or DENSITY[method]
    changes: dict[str, RowChange] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        own = [(number, adapter[name]) for number, adapter in enumerate(adapters) if name in adapter]
        stacks = [(number, change.matrices()) for number, change in own]
        matrices = [
            Combined(
                tuple(
                    _sparse(stack[place], method, share, f"{seed} {number} {place} {name}") for number, stack in stacks
                ),
                tuple(float(weights[number]) for number, _ in stacks),
                together,
            )
            for place in range(len(stacks[0][1]))
        ]
        changes[name] = matrices[0] if len(own[0][1].shape) == 2 else CombinedExperts(tuple(matrices))
    return changes


@dataclass(frozen=True)
class Combined:
    """What several adapters change of one matrix (rows, columns): W' = W + together(deltas, weights)."""

    deltas: tuple[_Delta, ...]
    weights: tuple[float, ...]
    together: _Together

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        return self.deltas[0].factors.shape

    def matrices(self) -> Sequence[Combined]:
        """Itself."""
        return (self,)

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """W' in fp32 of `weight`, these rows in any type: whole tiles of the matrix."""
        deltas = [delta.values(weight, rows) for delta in self.deltas]
        return self.together.values(deltas, self.weights).add_(weight)

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The same in fp64, for any rows, and the size of the terms that it is the sum of.

        Where fp32 may keep another value or elect another sign, that size is so large that either result is right.
        """
        before = weight.double()
        merged = self.together.exact([delta.exact(weight, rows) for delta in self.deltas], self.weights)
        return before + merged.values, before.abs() + merged.reach


@dataclass(frozen=True)
class CombinedExperts:
    """What several adapters change of a stack of matrices (experts, rows, columns)."""

    own: tuple[Combined, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, rows, columns)."""
        return (len(self.own), *self.own[0].shape)

    def matrices(self) -> Sequence[Combined]:
        """One for each expert."""
        return self.own

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """Of one matrix only: raises TypeError."""
        raise TypeError("a stack is changed matrix by matrix: use matrices()")

    def exact(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Of one matrix only: raises TypeError."""
        raise TypeError("a stack is changed matrix by matrix: use matrices()")


# ---- D_i: what one adapter changes of one matrix, and what is kept of that


class _Exact(NamedTuple):
    """Values in fp64, the size of the terms that they are the sum of, and where fp32 may drop what is kept here."""

    values: Tensor
    reach: Tensor
    unsure: Tensor


class _Delta(Protocol):
    @property
    def factors(self) -> LowRank: ...

    def values(self, weight: Tensor, rows: slice) -> Tensor:
        """In fp32, new memory."""
        ...

    def exact(self, weight: Tensor, rows: slice) -> _Exact: ...


def _sparse(factors: LowRank, method: str, density: float, key: str) -> _Delta:
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

    def exact(self, weight: Tensor, rows: slice) -> _Exact:
        origin = (torch.zeros_like(weight) if self.factors.magnitude is None else weight).double()
        changed, reach = self.factors.exact(origin, rows)
        return _Exact(changed - origin, reach + origin.abs(), torch.zeros_like(changed, dtype=torch.bool))


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

    def exact(self, weight: Tensor, rows: slice) -> _Exact:
        values, reach, _ = super().exact(weight, rows)
        above, slack = values.abs() - self.threshold, _ROUNDING * reach
        dropped = above < -slack
        return _Exact(values.masked_fill(dropped, 0), reach.masked_fill(dropped, 0), above.abs() <= slack)


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

    def exact(self, weight: Tensor, rows: slice) -> _Exact:
        values, reach, unsure = super().exact(weight, rows)
        dropped = self._dropped(rows)
        return _Exact(
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


# ---- what becomes of the deltas


class _Merged(NamedTuple):
    """Values in fp64, and the size of the terms that they are the sum of."""

    values: Tensor
    reach: Tensor


class _Together(Protocol):
    def values(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """In fp32; overwrites the deltas."""
        ...

    def exact(self, deltas: Sequence[_Exact], weights: Sequence[float]) -> _Merged: ...


@dataclass(frozen=True)
class _Sum:
    """sum_i w_i D_i."""

    def values(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        total = deltas[0].mul_(weights[0])
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            total.add_(delta, alpha=weight)
        return total

    def exact(self, deltas: Sequence[_Exact], weights: Sequence[float]) -> _Merged:
        values, reach, _, scale = _stacked(deltas, weights)
        return _Merged((scale * values).sum(0), (scale.abs() * reach).sum(0))


@dataclass(frozen=True)
class _AgreeingMean:
    """sum over {i: sign D_i = s} of w_i D_i / their number, s the sign of sum_i D_i or of sum_i sign D_i."""

    majority: str

    def values(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        votes = deltas if self.majority == "total" else [delta.sign() for delta in deltas]
        mass = votes[0].clone()
        for vote in votes[1:]:
            mass += vote
        sign = torch.where(mass >= 0, 1.0, -1.0)
        total, number = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(deltas, weights, strict=True):
            agreeing = delta.mul_(sign).clamp_(min=0)  # |D_i|, or 0 where it does not agree
            total.add_(agreeing, alpha=weight)
            number += agreeing > 0
        return total.div_(number.clamp_(min=1)).mul_(sign)

    def exact(self, deltas: Sequence[_Exact], weights: Sequence[float]) -> _Merged:
        values, reach, unsure, scale = _stacked(deltas, weights)
        slack = _ROUNDING * reach
        mass = values.sum(0) if self.majority == "total" else values.sign().sum(0)
        agree = values.sign() == torch.where(mass >= 0, 1, -1)
        merged = (scale * values * agree).sum(0) / agree.sum(0).clamp(min=1)
        undecided = (unsure | (values.abs() < slack)).any(0)
        if self.majority == "total":
            undecided |= mass.abs() < slack.sum(0)
        either = (scale * values).abs().sum(0) * undecided / torch.finfo(torch.float32).eps
        return _Merged(merged, (scale.abs() * reach).sum(0) + either)


def _stacked(deltas: Sequence[_Exact], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, reach, unsure, weights), each (adapters, rows, columns) or (adapters, 1, 1)."""
    values, reach, unsure = (torch.stack(parts) for parts in zip(*deltas, strict=True))
    return values, reach, unsure, torch.tensor(weights, dtype=torch.float64)[:, None, None]


# ---- what cannot be combined


def _check_options(adapters: int, weights: Sequence[float], method: str, density: float | None, majority: str) -> None:
    """Raise ConfigurationError for the first that is wrong."""
    if adapters == 0:
        raise ConfigurationError("no adapters", expected="one or more", todo="name the folders of those to combine")
    if len(weights) != adapters:
        raise ConfigurationError(
            f"{len(weights)} weights for {adapters} adapters",
            expected="one weight for each adapter, in their order",
            todo=f"for instance {','.join(['1'] * adapters)}",
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigurationError(f"weights={list(weights)}", expected="finite numbers", todo="correct the weights")
    _check_known("method", method, METHODS)
    _check_known("majority", majority, MAJORITIES)
    if majority != "total" and not method.endswith("ties"):
        raise ConfigurationError(
            f"majority={majority!r} for method={method!r}, which elects no signs",
            expected="'total', which is what it is if it is not given",
            todo="leave it out, or use method='ties' or 'dare_ties'",
        )
    if density is None:
        return
    if method == "linear":
        raise ConfigurationError(
            f"density={density:g} for method='linear', which keeps every value",
            expected="no density",
            todo="leave it out, or use method='ties', 'dare_linear' or 'dare_ties'",
        )
    if not 0 < density <= 1:
        raise ConfigurationError(
            f"density={density:g}",
            expected="the share of the values that is kept: more than 0, at most 1",
            todo=f"leave it out for {DENSITY[method]:g}, or choose a share",
        )


def _check_known(option: str, value: str, known: Sequence[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    raise ConfigurationError(
        f"{option}={value!r}",
        expected=f"one of {', '.join(known)}",
        todo=f"did you mean {near[0]!r}?" if near else f"choose one; {known[0]!r} is what it is if it is not given",
    )


def _check_shapes(adapters: Sequence[Mapping[str, LowRank]]) -> None:
    """Raise ArtifactError with every tensor of which adapters change different shapes."""
    found: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for number, adapter in enumerate(adapters, 1):
        for name, change in adapter.items():
            found.setdefault(name, {}).setdefault(change.shape, []).append(number)
    lines = [
        f"{name}: "
        + ", ".join(f"{' x '.join(map(str, shape))} in {_numbered(numbers)}" for shape, numbers in shapes.items())
        for name, shapes in found.items()
        if len(shapes) > 1
    ]
    if lines:
        shown = "\n  ".join(lines[:SHOWN]) + (f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
        raise ArtifactError(
            f"the adapters change tensors of different shapes:\n  {shown}",
            expected="adapters that were trained on the same base",
            todo="combine only those",
        )


def _check_no_magnitudes(adapters: Sequence[Mapping[str, LowRank]]) -> None:
    """Raise ConfigurationError where an adapter is DoRA: its largest changes depend on all of W."""
    dora = [
        number
        for number, adapter in enumerate(adapters, 1)
        if any(change.magnitude is not None for change in adapter.values())
    ]
    if dora:
        raise ConfigurationError(
            f"{_numbered(dora)} with DoRA for method='ties', which would need the whole stored weight at once",
            expected="adapters without magnitudes: LoRA, PiSSA, VeRA",
            todo="use method='linear', 'dare_linear' or 'dare_ties', or first make it a LoRA (peft.convert_to_lora)",
        )


def _numbered(numbers: Sequence[int]) -> str:
    return f"adapter{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
