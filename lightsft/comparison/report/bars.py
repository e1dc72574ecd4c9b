"""Interval bars of a table: pixels of a value, its interval and a mark, on one scale for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightsft.comparison.report.facts import baseline_values, best_baseline, score_values, span
from lightsft.comparison.report.scale import Scale
from lightsft.comparison.report.wording import Results, is_number

WIDTH = 110  # pixels
Bar = dict[str, float]


def score_bars(results: Results) -> dict[str, Bar | None]:
    """By strategy its score and interval; `mark` is the strongest baseline."""
    values = score_values(results)
    if not values:
        return {}
    scale = _scale([*values, *baseline_values(results)[:1]])
    baseline = best_baseline(results)
    mark = None if baseline is None else baseline[1]
    return {row["strategy"]: bar(scale, row.get("score"), row.get("interval"), mark) for row in results["summary"]}


def difference_bars(comparisons: Sequence[Results]) -> list[Bar | None]:
    """Of each comparison its difference and interval; `mark` is zero."""
    values = [end for one in comparisons for end in (one.get("difference"), *(one.get("interval") or ()))]
    known = [value for value in values if is_number(value)]
    if not known:
        return [None for _ in comparisons]
    scale = _scale([*known, 0.0])
    return [bar(scale, one.get("difference"), one.get("interval"), 0.0) for one in comparisons]


def bar(scale: Scale, value: Any, interval: Sequence[float] | None, mark: float | None) -> Bar | None:
    """The pixels; None without a value."""
    if not is_number(value):
        return None
    low, high = interval or (value, value)
    places = {"low": low, "high": high, "value": value, **({} if mark is None else {"mark": mark})}
    return {name: round(scale(place), 1) for name, place in places.items()}


def _scale(values: Sequence[float]) -> Scale:
    return Scale(*span(values), 4, WIDTH - 4)
