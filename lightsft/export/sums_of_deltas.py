"""What becomes of several adapters' changes of one matrix; see `lightsft.export.combining`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightsft.export.sparse_deltas import Exact

_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of the terms' size: how far fp32 may be from what is exact


class _Merged(NamedTuple):
    """Values in fp64, and the size of the terms that they are the sum of."""

    values: Tensor
    reach: Tensor


class Together(Protocol):
    """One change of several."""

    def values(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """In fp32; overwrites the deltas."""
        ...

    def exact(self, deltas: Sequence[Exact], weights: Sequence[float]) -> _Merged:
        """The same in fp64, and how far fp32 may be from it."""
        ...


@dataclass(frozen=True)
class Sum:
    """sum_i w_i D_i."""

    def values(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """In fp32; overwrites the deltas."""
        total = deltas[0].mul_(weights[0])
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            total.add_(delta, alpha=weight)
        return total

    def exact(self, deltas: Sequence[Exact], weights: Sequence[float]) -> _Merged:
        """The same in fp64, and how far fp32 may be from it."""
        values, reach, _, scale = _stacked(deltas, weights)
        return _Merged((scale * values).sum(0), (scale.abs() * reach).sum(0))


@dataclass(frozen=True)
class AgreeingMean:
    """sum over {i: sign D_i = s} of w_i D_i / their number, s the sign of sum_i D_i or of sum_i sign D_i."""

    majority: str

    def values(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """In fp32; overwrites the deltas."""
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

    def exact(self, deltas: Sequence[Exact], weights: Sequence[float]) -> _Merged:
        """The same in fp64, and how far fp32 may be from it."""
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


def _stacked(deltas: Sequence[Exact], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, reach, unsure, weights), each (adapters, rows, columns) or (adapters, 1, 1)."""
    values, reach, unsure = (torch.stack(parts) for parts in zip(*deltas, strict=True))
    return values, reach, unsure, torch.tensor(weights, dtype=torch.float64)[:, None, None]
