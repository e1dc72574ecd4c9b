"""Which strategies are at most a margin worse than the best one, and which of them costs least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightsft.comparison.statistics.holm import holm
from lightsft.comparison.statistics.paired import ALPHA, Difference, above
from lightsft.comparison.statistics.resampling import Measured


@dataclass(frozen=True)
class NonInferior:
    """within: the best one, and those shown to be less than `margin` worse; cheapest: by the name of a cost."""

    margin: float
    best: str
    within: tuple[str, ...]
    cheapest: Mapping[str, str]
    verdict: str = ""

    def as_json(self) -> dict[str, Any]:
        """`non_inferior`."""
        return {
            "margin": self.margin,
            "best": self.best,
            "within": list(self.within),
            "cheapest": dict(self.cheapest),
            "verdict": self.verdict,
        }


def non_inferior(
    differences: Sequence[Difference], best: str, margin: float, measured: Sequence[Measured]
) -> NonInferior:
    """One-sided tests that a strategy minus the best one is above -margin, at 5 % for all of them together (Holm).

    differences: of every other strategy (first) from the best one (second). That no difference was detected is no
    reason to be within: with few seeds and examples nothing is.
    """
    adjusted = holm([above(one, -margin) for one in differences])
    within = (best, *(one.first for one, p in zip(differences, adjusted, strict=True) if p <= ALPHA))
    return NonInferior(margin, best, within, _cheapest([one for one in measured if one.label in within]))


def _cheapest(measured: Sequence[Measured]) -> dict[str, str]:
    """For each cost that is known of all of them, the one that costs least."""
    named = [name for name in measured[0].costs if all(_known(one.costs.get(name)) for one in measured)]
    return {name: min(measured, key=lambda one: one.costs[name] or 0.0).label for name in named}


def _known(cost: float | None) -> bool:
    return cost is not None and math.isfinite(cost)
