"""Learning curves: mean over seeds with a band from the lowest to the highest seed, over steps, tokens or seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from lightsft.comparison.report.axes import linear_axis
from lightsft.comparison.report.drawing import MARK, color, dash, legend, plain_color, quantitative, svg
from lightsft.comparison.report.facts import span
from lightsft.comparison.report.wording import Results, is_number, words

VIEWS = (  # height, along, what the choice is called
    ("score", "step", "score by steps"),
    ("score", "tokens", "score by tokens"),
    ("score", "seconds", "score by seconds"),
    ("loss", "step", "training loss by steps"),
)
Line = list[dict[str, float]]  # points with x, mean, low, high


def curve_plots(results: Results) -> list[dict[str, Any]]:
    """A plot of every view for which there is data."""
    return [plot for view in VIEWS if (plot := _plot(results, *view)) is not None]


def _plot(results: Results, height: str, along: str, choice: str) -> dict[str, Any] | None:
    names = list(dict.fromkeys(trial["strategy"] for trial in results["trials"]))
    values = []
    for number, name in enumerate(names):
        hue = {"color": color(number), "dash": dash(number)}
        for index, line in enumerate(lines(_curves(results, name), height, along)):
            values += [{**point, **hue, "line": f"{number}.{index}"} for point in line]
    if not values:
        return None
    target = target_score(results) if height == "score" else None
    what = f"validation {words(results['metric'])}" if height == "score" else "training loss"
    unit = "steps" if along == "step" else along
    title = f"{what.capitalize()} by {unit}"
    shown = dict.fromkeys(value["color"] for value in values)
    return {
        "title": title,
        "choice": choice,
        "svg": svg(_layers(values, target, what, unit), title),
        "legend": [entry for entry in legend(names) if entry["color"] in shown],
        "target": target,
    }


def target_score(results: Results) -> float | None:
    """The score whose time was taken, if there is one."""
    target = (results.get("config") or {}).get("score_target")
    return target if is_number(target) else None


def _curves(results: Results, strategy: str) -> list[Sequence[Results]]:
    trials = [trial for trial in results["trials"] if trial["strategy"] == strategy and trial["status"] == "finished"]
    return [trial["curve"] for trial in trials if trial.get("curve")]


def lines(curves: Sequence[Sequence[Results]], height: str, along: str) -> list[Line]:
    """The mean of several seeds' curves over the steps that all of them reached, with its lowest and highest seed.

    Where seeds have fewer than two steps in common (a budget in seconds, early stopping), each is a line of its own,
    so that no mean jumps because a seed ended. Tokens and seconds differ between seeds: a point stands at their mean.
    """
    known = [_known(curve, height, along) for curve in curves]
    known = [curve for curve in known if curve]
    if not known:
        return []
    common = sorted(set.intersection(*(set(curve) for curve in known)))
    if len(common) < 2 and len(known) > 1:
        return [_mean([curve], sorted(curve), height, along) for curve in known]
    return [_mean(known, common, height, along)]


def _known(curve: Sequence[Results], height: str, along: str) -> dict[int, Results]:
    """The points that have both values, by step."""
    points = [point for point in curve if is_number(point.get(height)) and is_number(point.get(along))]
    return {point.get("step", number): point for number, point in enumerate(points)}


def _mean(curves: Sequence[dict[int, Results]], steps: Iterable[int], height: str, along: str) -> Line:
    line = []
    for step in steps:
        values = [curve[step][height] for curve in curves]
        x = fmean(curve[step][along] for curve in curves)
        line.append({"x": x, "mean": fmean(values), "low": min(values), "high": max(values)})
    return line


def _layers(values: list[dict[str, Any]], target: float | None, what: str, unit: str) -> list[dict[str, Any]]:
    x = linear_axis([value["x"] for value in values]).encoding("x", unit)
    ends = [value[end] for value in values for end in ("low", "high")]
    y = quantitative("mean", *span([*ends, *([] if target is None else [target])]), what, tickCount=5)
    each = {"x": x, "color": plain_color(), "detail": {"field": "line"}}
    band = {"type": "area", "opacity": 0.16, "line": False}
    aim = {"data": {"values": [{"target": target}]}, "mark": {"type": "rule", "strokeDash": [5, 4], "color": MARK}}
    drawn = [
        {"mark": band, "encoding": each | {"y": {**y, "field": "low"}, "y2": {"field": "high"}}},
        {
            "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 18}},
            "encoding": each | {"y": y, "strokeDash": {"field": "dash", "type": "nominal", "scale": None}},
        },
    ]
    layers: list[dict[str, Any]] = [{"data": {"values": values}, "layer": drawn}]
    return layers if target is None else [*layers, {**aim, "encoding": {"y": {**y, "field": "target"}}}]
