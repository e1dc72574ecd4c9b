"""How much the seeds of a strategy differ at least, learnt from all strategies together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steadiness:
    """The median and the mean over strategies of what training alone makes the score of a seed vary.

    The variance of a few scores is often far too small by chance, and a difference is then found where there is none.
    In a comparison the variance over seeds of each strategy is taken to be at least the median of all, or, with two
    seeds, at least their mean. It holds the family-wise error where the strategies are unequally steady too; one that
    is unsteady raises the mean and hides differences between pairs of seeds, and leaves the median alone.
    """

    median: float = 0.0
    mean: float = 0.0

    @classmethod
    def of(cls, variances: Sequence[float]) -> Steadiness:
        """From sigma_seed^2 of each strategy with several seeds, an estimate that may be below 0."""
        if not variances:
            return cls()
        return cls(max(0.0, float(np.median(variances))), max(0.0, float(np.mean(variances))))

    def least(self, seeds: int) -> float:
        """The least sigma_seed^2 of a strategy with so many seeds."""
        return max(self.median, self.mean) if seeds == 2 else self.median
