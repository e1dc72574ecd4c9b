"""Score against every cost that was measured, with the strategies that no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightsft.comparison.report.axes import Axis, linear_axis, logarithmic_axis
from lightsft.comparison.report.drawing import ACCENT, HEIGHT, INK, MARK, MUTED, WIDTH, plain_color, quantitative, svg
from lightsft.comparison.report.drawing import text_layer as texts
from lightsft.comparison.report.facts import baseline_score, baseline_values, baselines, score_values, span
from lightsft.comparison.report.labels import Box, Mark, Place, label_box, place_labels
from lightsft.comparison.report.scale import Scale
from lightsft.comparison.report.wording import Results, is_number, words

APART = 8.0  # a cost whose largest value is so many times its smallest is drawn on a log scale


@dataclass(frozen=True)
class Cost:
    """One horizontal axis: a column of the summary, how many of its units make one on the axis."""

    column: str
    name: str
    unit_name: str = ""
    unit: float = 1.0
    logarithmic: bool = False

    def title(self, logarithmic: bool) -> str:
        """`peak memory (MiB, log scale)`."""
        inside = ", ".join(filter(None, [self.unit_name, "log scale" if logarithmic else ""]))
        return f"{self.name} ({inside})" if inside else self.name


COSTS = (
    Cost("trainable_parameters", "trainable parameters", logarithmic=True),
    Cost("peak_bytes", "peak memory", "MiB", 2**20),
    Cost("seconds", "training time", "seconds"),
    Cost("adapter_bytes", "file size", "MiB", 2**20),
    Cost("latency_ms", "latency", "ms"),
    Cost("merged_latency_ms", "latency when merged", "ms"),
    Cost("seconds_to_target", "time to the target score", "seconds"),
    Cost("joules", "energy", "kJ", 1000),
)


def pareto_plots(results: Results) -> list[dict[str, Any]]:
    """A plot for every cost that at least one scored strategy has."""
    return [plot for cost in COSTS if (plot := _plot(results, cost)) is not None]


def front(costs: Sequence[float], scores: Sequence[float], *, greater_is_better: bool) -> list[int]:
    """The points that no other one dominates, cheapest first.

    A point dominates another if it is neither dearer nor worse, and cheaper or better.
    """
    sign = 1 if greater_is_better else -1
    points = [(cost, -sign * score) for cost, score in zip(costs, scores, strict=True)]
    kept = [
        number
        for number, (cost, loss) in enumerate(points)
        if not any(a <= cost and b <= loss and (a, b) != (cost, loss) for a, b in points)
    ]
    return sorted(kept, key=lambda number: points[number])


def _plot(results: Results, cost: Cost) -> dict[str, Any] | None:
    points = [
        {"number": number, "name": row["strategy"], "cost": row[cost.column] / cost.unit, **_vertical(row)}
        for number, row in enumerate(results["summary"], start=1)
        if is_number(row.get(cost.column)) and is_number(row.get("score"))
    ]
    if not points:
        return None
    values = [point["cost"] for point in points]
    logarithmic = cost.logarithmic or (min(values) > 0 and max(values) / min(values) >= APART)
    axis = logarithmic_axis(values) if logarithmic else linear_axis(values)
    best = front(values, [point["score"] for point in points], greater_is_better=results["greater_is_better"])
    for number, (point, place) in enumerate(zip(points, axis.places, strict=True)):
        point |= {"x": place, "front": number in best, "color": ACCENT if number in best else MUTED}
    marks = _marks(results, points, axis)
    lines = _baseline_lines(results, marks)
    named = _label(points, marks, lines, best)
    title = f"Test {words(results['metric'])} against {cost.title(logarithmic)}"
    return {
        "title": title,
        "choice": cost.name,
        "svg": svg(_layers(results, points, lines, best, axis, cost.title(logarithmic)), title),
        "front": [points[number]["name"] for number in best],
        "dominated": len(points) - len(best),
        "baselines": [words(name) for name in _near_baselines(results)],
        "numbered": not named,
        "missing": len(results["summary"]) - len(points),
    }


def _vertical(row: Results) -> dict[str, float]:
    low, high = row.get("interval") or (row["score"], row["score"])
    return {"score": row["score"], "low": low, "high": high}


def _near_baselines(results: Results) -> dict[str, float]:
    """The two strongest baselines, where they stand so near that drawing them leaves the strategies apart.

    Near is within one height of what the strategies and their intervals take.
    """
    values = score_values(results)
    height = max(values) - min(values) or abs(max(values))
    scored = {name: baseline_score(results, scores, "test") for name, scores in baselines(results)}
    strongest = baseline_values(results)[:2]
    return {
        name: value
        for name, value in scored.items()
        if value in strongest and min(values) - height <= value <= max(values) + height
    }


def _domain(results: Results) -> tuple[float, float]:
    return span([*score_values(results), *_near_baselines(results).values()])


def _layers(
    results: Results,
    points: list[dict[str, Any]],
    lines: list[dict[str, Any]],
    best: Sequence[int],
    axis: Axis,
    title: str,
) -> list[dict[str, Any]]:
    """Baselines, the front as steps, interval bars, points, names."""
    low, high = _domain(results)
    x = axis.encoding("x", title)
    y = quantitative("score", low, high, f"test {words(results['metric'])}", tickCount=5)
    hue = plain_color()
    bar = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": hue}
    circle = {"type": "circle", "size": 80, "opacity": 1}
    steps = [{"x": points[number]["x"], "score": points[number]["score"]} for number in best]
    stepped = {"type": "line", "interpolate": "step-after", "color": ACCENT, "strokeWidth": 1.5}
    return [
        {
            "data": {"values": lines},
            "layer": [
                {"mark": {"type": "rule", "strokeDash": [5, 4], "color": MARK}, "encoding": {"y": y}},
                texts(MARK, italic=True),
            ],
        },
        {"data": {"values": steps}, "mark": stepped, "encoding": {"x": x, "y": y}},
        {
            "data": {"values": points},
            "layer": [
                {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": bar},
                {"mark": circle, "encoding": {"x": x, "y": y, "color": hue}},
                {"transform": [{"filter": "datum.front"}], **texts(INK)},
                {"transform": [{"filter": "!datum.front"}], **texts(MUTED)},
            ],
        },
    ]


def _marks(results: Results, points: list[dict[str, Any]], axis: Axis) -> list[Mark]:
    to_x, to_y = Scale(axis.low, axis.high, 0, WIDTH), Scale(*_domain(results), HEIGHT, 0)
    return [(to_x(p["x"]), to_y(p["score"]), to_y(p["high"]), to_y(p["low"])) for p in points]


def _baseline_lines(results: Results, marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """The near baselines' lines with their names above, at the end where fewer intervals cross the name."""
    to_pixel = Scale(*_domain(results), HEIGHT, 0)
    lines = []
    for index, (name, value) in enumerate(_near_baselines(results).items()):
        ends: list[Place] = [(WIDTH - 2, to_pixel(value) - 7, "right"), (2, to_pixel(value) - 7, "left")]
        boxes = [label_box(words(name), place) for place in ends]
        order = sorted((0, 1), key=lambda end: (_crossings(boxes[end], marks), (end + index) % 2))
        x, y, align = ends[order[0]]
        lines.append({"label": words(name), "score": value, "label_x": x, "label_y": y, "align": align})
    return lines


def _crossings(box: Box, marks: Sequence[Mark]) -> int:
    left, top, right, bottom = box
    return sum(left < x < right and high < bottom and low > top for x, _, high, low in marks)


def _label(
    points: list[dict[str, Any]], marks: Sequence[Mark], lines: list[dict[str, Any]], best: Sequence[int]
) -> bool:
    """Give every point a label beside it; returns whether names fitted, or numbers had to do."""
    taken = [label_box(line["label"], (line["label_x"], line["label_y"], line["align"])) for line in lines]
    taken += _steps([marks[number] for number in best])
    names, numbers = [point["name"] for point in points], [str(point["number"]) for point in points]
    labels, named = place_labels(names, numbers, marks, taken)
    for point, (text, (x, y, align)) in zip(points, labels, strict=True):
        point |= {"label": text, "label_x": x, "label_y": y, "align": align}
    return named


def _steps(marks: Sequence[Mark]) -> list[Box]:
    """The pixels of the front's line: from each point to the right, then up or down to the next."""
    boxes = []
    for (x, y, _, _), (next_x, next_y, _, _) in pairwise(marks):
        boxes += [(x, y - 2, next_x, y + 2), (next_x - 2, min(y, next_y), next_x + 2, max(y, next_y))]
    return boxes
