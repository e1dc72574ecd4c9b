"""Axes: the ends of a plot in data units, and the ticks that Vega-Lite draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightsft.comparison.report.drawing import quantitative
from lightsft.comparison.report.facts import span


@dataclass(frozen=True)
class Axis:
    """An axis: its ends in its own units, how Vega-Lite draws its ticks, and where values stand on it."""

    low: float
    high: float
    ticks: Mapping[str, Any]
    places: tuple[float, ...]

    def encoding(self, field: str, title: str) -> dict[str, Any]:
        """The axis as Vega-Lite takes it."""
        return quantitative(field, self.low, self.high, title, **self.ticks)


def linear_axis(values: Sequence[float]) -> Axis:
    """An axis on which values stand as they are."""
    low, high = span(values)
    return Axis(low, high, {"tickCount": 4, "format": ",~r" if high < 1e4 else "~s", "grid": False}, tuple(values))


def logarithmic_axis(values: Sequence[float]) -> Axis:
    """An axis of powers of ten; a value of zero stands one decade left of the smallest."""
    powers = [math.log10(value) for value in values if value > 0] or [1.0]
    zero = math.floor(min(powers)) - 1
    places = tuple(math.log10(value) if value > 0 else float(zero) for value in values)
    low, high = min(places) - 0.3, max(places) + 0.3
    below_one = ".0e" if min(powers) < -3 else "~g"  # 1e-5, or 0.1
    number = (
        f"datum.value < 0 ? replace(format(pow(10, datum.value), '{below_one}'), '+', '')"
        " : replace(format(pow(10, datum.value), '.1~s'), 'G', 'B')"
    )
    label = f"datum.value == {zero} ? '0' : {number}" if low < zero else number
    ticks = _ticks(low, high, zero if low < zero else None)
    return Axis(low, high, {"values": ticks, "labelExpr": label, "grid": False}, places)


def _ticks(low: float, high: float, zero: int | None) -> list[float]:
    """Whole powers of ten, with 2 and 5 between them on a short axis; `zero` stays alone in its decade."""
    start = low if zero is None else zero + 1
    digits = (1, 2, 5) if high - start < 2 else (1,)
    decades = range(math.floor(start), math.ceil(high) + 1)
    ticks = [round(power + math.log10(digit), 9) for power in decades for digit in digits]
    first = [] if zero is None else [float(zero)]
    return first + [tick for tick in ticks if start <= tick <= high]
