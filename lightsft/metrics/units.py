"""How a score is said: a share of 0.021 as 2.1 points, a loss as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """A score is shown as score * scale, followed by the name."""

    scale: float = 1.0
    name: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest score: a scale with points ends at 100 of them, any other nowhere."""
        return (0.0, 100 / self.scale) if self.name else (-math.inf, math.inf)

    def as_json(self) -> dict[str, Any]:
        """{"scale", "name"}."""
        return {"scale": self.scale, "name": self.name}

    def amount(self, score: float) -> str:
        """A round score with its name: 1 point, 0.5 points, 0.005."""
        number = f"{score * self.scale:.3g}"
        return f"{number} {self.name.removesuffix('s') if number == '1' else self.name}".rstrip()

    def measured(self, score: float, interval: tuple[float, float] | None) -> str:
        """2.1 points [1.2, 3.0], to as many decimals as the interval's width gives sense to."""
        ends = (score, score) if interval is None else interval
        decimals = self._decimals((ends[1] - ends[0]) / 2 * self.scale)
        # adding 0.0 turns the -0.0 of rounding into 0.0
        said, low, high = (f"{round(end * self.scale, decimals) + 0.0:.{decimals}f}" for end in (score, *ends))
        return f"{said} {self.name}".rstrip() + ("" if interval is None else f" [{low}, {high}]")

    def _decimals(self, half_width: float) -> int:
        if not half_width > 0:
            return 1 if self.name else 4
        magnitude = math.floor(math.log10(half_width))
        return min(12, max(1, -magnitude) if self.name else max(0, 1 - magnitude))


POINTS = Unit(100, "points")  # of a share in [0, 1]
POINTS_OF_HUNDRED = Unit(1, "points")  # of a score from 0 to 100
NO_UNIT = Unit()
