"""Score against cost as inline SVG, drawn by Vega-Lite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightsft.comparison.report.facts import baseline_score, baseline_values, baselines, score_values, span
from lightsft.comparison.report.scale import Scale
from lightsft.comparison.report.wording import Results, direction, is_number, words

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


Place = tuple[float, float, str]  # x and y of a text in pixels, and its alignment


PLOT_WIDTH, PLOT_HEIGHT = 400, 260  # pixels inside the axes


LETTER_WIDTH, LINE_HEIGHT = 6.8, 14.0  # pixels of one letter at 12 px


INK, MUTED, GRID, MARK, ACCENT = (f"var(--{name})" for name in ("ink", "muted", "line", "mark", "accent"))


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a plot: its ends in data units, and how Vega-Lite draws its ticks."""

    low: float
    high: float
    ticks: Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """One horizontal axis: a column of the summary, how many of its units make one on the axis."""

    column: str
    title: str
    unit: float = 1.0
    logarithmic: bool = False


def plots(results: Results) -> list[dict[str, Any]]:
    """Score against trainable parameters, and against peak memory (seconds where no memory was measured)."""
    memory = Cost("peak_bytes", "peak memory (MiB)", unit=2**20)
    measured = any(is_number(row.get("peak_bytes")) for row in results["summary"])
    second = memory if measured else Cost("seconds", "training time (seconds)")
    costs = (Cost("trainable_parameters", "trainable parameters (log scale)", logarithmic=True), second)
    return [plot for cost in costs if (plot := _plot(results, cost)) is not None]


def _plot(results: Results, cost: Cost) -> dict[str, Any] | None:
    points = [
        {"number": number, "name": row["strategy"], "cost": row[cost.column] / cost.unit, **_vertical(row)}
        for number, row in enumerate(results["summary"], start=1)
        if is_number(row.get(cost.column)) and is_number(row.get("score"))
    ]
    if not points:
        return None
    winner = (results.get("winner") or {}).get("strategy")
    axis = _logarithmic_axis(points) if cost.logarithmic else _linear_axis(points)
    named = _place_labels(results, points, axis)
    for point in points:
        point["color"] = ACCENT if point["name"] == winner else MARK
    title = f"Test {words(results['metric'])} against {cost.title}"
    svg = _svg(_specification(results, points, axis, cost.title), title)
    return {
        "title": title,
        "svg": svg,
        "numbered": not named,
        "missing": len(results["summary"]) - len(points),
    }


def _vertical(row: Results) -> dict[str, float]:
    low, high = row.get("interval") or (row["score"], row["score"])
    return {"score": row["score"], "low": low, "high": high}


def _logarithmic_axis(points: list[dict[str, Any]]) -> Axis:
    """Set every point's `x` to its power of ten; a cost of zero stands one decade left of the smallest."""
    powers = [math.log10(point["cost"]) for point in points if point["cost"] > 0] or [1.0]
    zero = math.floor(min(powers)) - 1
    for point in points:
        point["x"] = math.log10(point["cost"]) if point["cost"] > 0 else zero
    low, high = min(point["x"] for point in points) - 0.3, max(point["x"] for point in points) + 0.3
    ticks = _logarithmic_ticks(low, high, zero if low < zero else None)
    label = "replace(format(pow(10, datum.value), '.1~s'), 'G', 'B')"
    if low < zero:
        label = f"datum.value == {zero} ? '0' : {label}"
    return Axis(low, high, {"values": ticks, "labelExpr": label})


def _logarithmic_ticks(low: float, high: float, zero: int | None) -> list[float]:
    """Whole powers of ten, with 2 and 5 between them on a short axis; `zero` stays alone in its decade."""
    start = low if zero is None else zero + 1
    digits = (1, 2, 5) if high - start < 2 else (1,)
    decades = range(math.floor(start), math.ceil(high) + 1)
    ticks = [round(power + math.log10(digit), 9) for power in decades for digit in digits]
    first = [] if zero is None else [float(zero)]
    return first + [tick for tick in ticks if start <= tick <= high]


def _linear_axis(points: list[dict[str, Any]]) -> Axis:
    """Set every point's `x` to its cost."""
    for point in points:
        point["x"] = point["cost"]
    low, high = span([point["x"] for point in points])
    return Axis(low, high, {"tickCount": 5, "format": ",~f"})


def _vertical_domain(results: Results) -> tuple[float, float]:
    return span([*score_values(results), *baseline_values(results)])


def _specification(results: Results, points: list[dict[str, Any]], axis: Axis, cost_title: str) -> dict[str, Any]:
    """The Vega-Lite plot: baseline lines, interval bars, points, labels. Colours are the page's variables."""
    score_title = f"test {words(results['metric'])} ({direction(results)})"
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"domain": [axis.low, axis.high], "nice": False, "zero": False},
    }
    y_scale = {"domain": list(_vertical_domain(results)), "nice": False, "zero": False}
    x_axis = {**x, "axis": {"title": cost_title, "grid": False, **axis.ticks}}
    y = {"type": "quantitative", "scale": y_scale, "axis": {"title": score_title, "tickCount": 6}}
    color = {"field": "color", "type": "nominal", "scale": None}
    lines = {
        "data": {"values": _baseline_lines(results)},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": MUTED},
                "encoding": {"y": {**y, "field": "score"}},
            },
            _text_layer(MUTED, italic=True),
        ],
    }
    dots = {
        "data": {"values": points},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "x": x_axis,
                    "y": {**y, "field": "low"},
                    "y2": {"field": "high"},
                    "color": color,
                },
            },
            {
                "mark": {"type": "circle", "size": 80, "opacity": 1},
                "encoding": {"x": x_axis, "y": {**y, "field": "score"}, "color": color},
            },
            _text_layer(INK),
        ],
    }
    return {"width": PLOT_WIDTH, "height": PLOT_HEIGHT, "config": _plot_style(), "layer": [lines, dots]}


def _text_layer(color: str, *, italic: bool = False) -> dict[str, Any]:
    """Texts at their own pixels (`label_x`, `label_y`), aligned as each of them says."""
    position = {"type": "quantitative", "scale": None, "axis": None}
    return {
        "mark": {
            "type": "text",
            "align": {"expr": "datum.align"},
            "baseline": "middle",
            "fontSize": 12,
            "color": color,
            "fontStyle": "italic" if italic else "normal",
        },
        "encoding": {
            "x": {"field": "label_x", **position},
            "y": {"field": "label_y", **position},
            "text": {"field": "label"},
        },
    }


def _plot_style() -> dict[str, Any]:
    axis = {
        "labelColor": MUTED,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "gridColor": GRID,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titlePadding": 8,
    }
    return {"background": None, "font": "system-ui, sans-serif", "view": {"stroke": None}, "axis": axis}


def _baseline_lines(results: Results) -> list[dict[str, Any]]:
    """The baselines' lines with their names above, at the right and left end in turn."""
    to_pixel = Scale(*_vertical_domain(results), PLOT_HEIGHT, 0)
    scored = [(name, baseline_score(results, scores, "test")) for name, scores in baselines(results)]
    known = [(name, value) for name, value in scored if is_number(value)]
    ends = [("right", PLOT_WIDTH - 2), ("left", 2)]
    return [
        {"label": name, "score": value, "align": ends[index % 2][0], "label_x": ends[index % 2][1]}
        | {"label_y": to_pixel(value) - 7}
        for index, (name, value) in enumerate(known)
    ]


def _place_labels(results: Results, points: list[dict[str, Any]], axis: Axis) -> bool:
    """Give every point a label beside it: its name, or its number in the table where the names would collide.

    Returns whether the names fitted.
    """
    lines = _baseline_lines(results)
    marks = _marks(results, points, axis)
    taken = [_label_box(line["label"], (line["label_x"], line["label_y"], line["align"])) for line in lines]
    for x, y, top, bottom in marks:
        taken += [(x - 5, y - 5, x + 5, y + 5), (x - 2, top, x + 2, bottom)]
    names, numbers = [point["name"] for point in points], [str(point["number"]) for point in points]
    places, texts = _free_places(names, marks, taken), names
    if None in places:
        places, texts = _free_places(numbers, marks, taken), numbers
    for point, text, mark, place in zip(points, texts, marks, places, strict=True):
        x, y, align = place or _candidates(mark)[0]
        point.update(label=text, label_x=x, label_y=y, align=align)
    return texts is names


def _marks(results: Results, points: list[dict[str, Any]], axis: Axis) -> list[Box]:
    """Of every point the pixels (x, y, top of its interval, bottom of its interval)."""
    to_x, to_y = Scale(axis.low, axis.high, 0, PLOT_WIDTH), Scale(*_vertical_domain(results), PLOT_HEIGHT, 0)
    return [(to_x(point["x"]), to_y(point["score"]), to_y(point["high"]), to_y(point["low"])) for point in points]


def _candidates(mark: Box) -> list[Place]:
    """Where a label may stand, the best place first: right, left, a little higher or lower, above, below."""
    x, y, top, bottom = mark
    beside = [(x + 9, "left"), (x - 9, "right")]
    outside = [top - 9, bottom + 9, top - 22, bottom + 22]
    return [(side, y + shift, align) for shift in (0, -10, 10) for side, align in beside] + [
        (x, height, "center") for height in outside
    ]


def _free_places(texts: Sequence[str], marks: Sequence[Box], taken: Iterable[Box]) -> list[Place | None]:
    """For each text the first place by its mark that is free, None where there is none."""
    boxes = list(taken)
    places: list[Place | None] = []
    for text, mark in zip(texts, marks, strict=True):
        free = (place for place in _candidates(mark) if _is_free(_label_box(text, place), boxes))
        places.append(next(free, None))
        boxes += [_label_box(text, place) for place in places[-1:] if place is not None]
    return places


def _label_box(text: str, place: Place) -> Box:
    x, y, align = place
    width = len(text) * LETTER_WIDTH
    left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * width
    return left, y - LINE_HEIGHT / 2, left + width, y + LINE_HEIGHT / 2


def _is_free(box: Box, taken: Iterable[Box]) -> bool:
    left, top, right, bottom = box
    inside = left >= 0 and right <= PLOT_WIDTH and top >= 0 and bottom <= PLOT_HEIGHT
    return inside and all(
        right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3] for other in taken
    )


def _svg(specification: dict[str, Any], title: str) -> Any:
    """Render with Vega-Lite; the result scales with the page and is one image to a screen reader."""
    import vl_convert
    from markupsafe import Markup

    svg = vl_convert.vegalite_to_svg(specification)
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = Markup('<svg {} role="img" aria-label="{}">').format(Markup(size.group()) if size else "", title)
    return opening + Markup(svg[svg.index(">") + 1 :])
