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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightsft.export.combining_checks import DENSITY, check_no_magnitudes, check_options, check_shapes
from lightsft.export.sparse_deltas import Delta, sparse
from lightsft.export.sums_of_deltas import AgreeingMean, Sum, Together
from lightsft.low_rank import LowRank
from lightsft.row_changes import RowChange


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
    check_options(len(adapters), weights, method, density, majority)
    check_shapes(adapters)
    if method == "ties":
        check_no_magnitudes(adapters)
    together: Together = AgreeingMean(majority) if method.endswith("ties") else Sum()
    share = 1.0 if method == "linear" else density or DENSITY[method]
    changes: dict[str, RowChange] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        own = [(number, adapter[name]) for number, adapter in enumerate(adapters) if name in adapter]
        stacks = [(number, change.matrices()) for number, change in own]
        matrices = [
            Combined(
                tuple(
                    sparse(stack[place], method, share, f"{seed} {number} {place} {name}") for number, stack in stacks
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

    deltas: tuple[Delta, ...]
    weights: tuple[float, ...]
    together: Together

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
