"""Score against the number of training examples."""

from __future__ import annotations

from typing import Any

from lightsft.comparison.report.axes import Axis, logarithmic_axis
from lightsft.comparison.report.drawing import color, dash, legend, plain_color, quantitative, svg
from lightsft.comparison.report.facts import span
from lightsft.comparison.report.wording import Results, is_number, words


def few_shot_plot(results: Results) -> dict[str, Any] | None:
    """A line per strategy with its intervals; None where no such scores were taken."""
    rows = [one for one in results.get("few_shot") or [] if is_number(one.get("score")) and one.get("examples")]
    if not rows:
        return None
    names = list(dict.fromkeys(str(row.get("strategy")) for row in rows))
    axis = logarithmic_axis([row["examples"] for row in rows])
    points = [_point(row, place, names, axis) for row, place in zip(rows, axis.places, strict=True)]
    metric = words(results["metric"])
    x = axis.encoding("x", "training examples (log scale)")
    y = quantitative("score", *span([point[end] for point in points for end in ("low", "high")]), f"test {metric}")
    hue = {"color": plain_color(), "detail": {"field": "line"}}
    layers = [
        {"mark": {"type": "rule"}, "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **hue}},
        {
            "mark": {"type": "line", "point": {"size": 40}},
            "encoding": {"x": x, "y": y, **hue, "strokeDash": {"field": "dash", "type": "nominal", "scale": None}},
        },
    ]
    title = f"Test {metric} by number of training examples"
    drawn = svg([{"data": {"values": points}, "layer": layers}], title)
    return {"title": title, "svg": drawn, "legend": legend(names), "rows": rows}


def _point(row: Results, place: float, names: list[str], axis: Axis) -> dict[str, Any]:
    """A strategy's score with this many examples, a little beside those of the others so that no interval hides one."""
    number = names.index(str(row.get("strategy")))
    beside = (number - (len(names) - 1) / 2) * 0.012 * (axis.high - axis.low)
    low, high = row.get("interval") or (row["score"], row["score"])
    point = {"x": place + beside, "score": row["score"], "low": low, "high": high, "line": number}
    return point | {"color": color(number), "dash": dash(number)}
