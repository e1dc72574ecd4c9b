"""The report of a comparison: `report.html`, one file that opens offline, and `report.md`, the same in short.

    results -> _verdict    who won, against what, what was merged, in one sentence
            -> _html       tables, inline interval bars, two Vega-Lite plots as inline SVG, confusion matrices
            -> _markdown   the same facts, shorter

Nothing in the page is loaded from elsewhere: the style is inline, there is no script, and a content security
policy says so to the browser. Whatever came from the user (labels, error texts, paths) is escaped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightsft.files import write_text

Results = Mapping[str, Any]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Place = tuple[float, float, str]  # x and y of a text in pixels, and its alignment

DASH = "–"
BASELINE_WORDS = {
    "untuned": "the untuned model",
    "majority": "always answering the most frequent label",
}
PLOT_WIDTH, PLOT_HEIGHT = 400, 260  # pixels inside the axes
MATRIX_LABELS = 30  # a larger confusion matrix is left to results.json
BAR_WIDTH = 110  # pixels of the summary table's interval bars
LETTER_WIDTH, LINE_HEIGHT = 6.8, 14.0  # pixels of one letter at 12 px
INK, MUTED, GRID, MARK, ACCENT = (f"var(--{name})" for name in ("ink", "muted", "line", "mark", "accent"))


def write_report(results: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` into `directory` and return their paths, in this order.

    `results` is the content of `results.json`. A comparison that is not finished, or in which every trial
    failed, has a report too: it says so.
    """
    results = {"summary": [], **results}  # a run that was interrupted has none yet
    markdown, html = directory / "report.md", directory / "report.html"
    write_text(markdown, _markdown(results))
    write_text(html, _html(results))
    return markdown, html


# ---------------------------------------------------------------------------------------------- the facts


def _verdict(results: Results) -> str:
    """The outcome in one sentence."""
    winner = results.get("winner")
    if not winner:
        return f"There is no winner: {_progress(results)}."
    row = _winning_row(results)
    scored = _scored(results, row) if row else ""
    return f"{winner['strategy']} won on validation{scored}; {_merged(results)}."


def _scored(results: Results, row: Results) -> str:
    metric = _words(results["metric"])
    interval = row.get("interval")
    between = f" (95 % interval {_score(interval[0])} to {_score(interval[1])})" if interval else ""
    return f" and has a test {metric} of {_score(row.get('score'))}{between}{_against_baseline(results, row)}"


def _against_baseline(results: Results, row: Results) -> str:
    baseline = _best_baseline(results)
    if baseline is None or not _is_number(row.get("score")):
        return ""
    name, value = baseline
    text = f" against {_score(value)} for {BASELINE_WORDS.get(name, name)}"
    low, high = row.get("interval") or (row["score"], row["score"])
    if low <= value <= high:
        return text + ", which lies inside that interval, so there is no clear gain"
    if (value > row["score"]) == results["greater_is_better"]:
        return text + ", which is better, so tuning did not pay"
    return text


def _merged(results: Results) -> str:
    winner = results["winner"]
    if not winner.get("merged"):
        return "nothing was merged"
    strategy, seed = winner.get("merged_strategy") or winner["strategy"], winner.get("merged_seed")
    which = "the winner" if strategy == winner["strategy"] else strategy
    return f"{which}{'' if seed is None else f' (seed {seed})'} was merged and {_certified(results)}"


def _certified(results: Results) -> str:
    certificate = results.get("certificate")
    if not certificate:
        return "has no certificate"
    return "its certificate passed" if certificate.get("passed") else "its certificate FAILED: do not use it"


def _progress(results: Results) -> str:
    trials = results["trials"]
    counts = {status: sum(trial["status"] == status for trial in trials) for status in ("failed", "pending")}
    finished = len(trials) - sum(counts.values())
    rest = [f"{count} {status}" for status, count in counts.items() if count]
    return ", ".join([f"{finished} of {len(trials)} trials finished", *rest])


def _interval_meaning(results: Results) -> str:
    examples = results.get("data", {}).get("test")
    seeds = max((row.get("seeds") or 0 for row in results["summary"]), default=0)
    which = f"the {_count(examples)} test examples" if _is_number(examples) else "the test examples"
    text = (
        f"Scores are means over seeds. Intervals are 95 % percentile intervals from resampling {which}:"
        " they say how far a score would move with other examples of the same kind."
    )
    if seeds == 1:
        return text + " Every strategy ran with one seed, so nothing here says how far another seed would move it."
    little = f" With {seeds} seeds they say little about other seeds"
    return text + little + "; the spread is the highest seed's score minus the lowest's."


def _split_roles() -> list[tuple[str, str]]:
    return [
        ("train", "fits the weights"),
        ("validation", "chooses the best seed and the winner"),
        ("test", "is scored once per trial and chooses nothing"),
    ]


def _baselines(results: Results) -> list[tuple[str, Results]]:
    return [(name, scores) for name, scores in (results.get("baselines") or {}).items() if scores]


def _baseline_score(results: Results, scores: Results, split: str) -> Any:
    return (scores.get(split) or {}).get(results["metric"])


def _best_baseline(results: Results) -> tuple[str, float] | None:
    """Name and test score of the strongest baseline, None without one."""
    scored = [(name, _baseline_score(results, scores, "test")) for name, scores in _baselines(results)]
    known = [(name, value) for name, value in scored if _is_number(value)]
    choose = max if results["greater_is_better"] else min
    return choose(known, key=lambda pair: pair[1]) if known else None


def _winning_row(results: Results) -> Results | None:
    winner = results.get("winner") or {}
    return next((row for row in results["summary"] if row["strategy"] == winner.get("strategy")), None)


def _without_result(results: Results) -> list[str]:
    """The strategies that have trials but no line in the summary, in the order they ran."""
    known = {row["strategy"] for row in results["summary"]}
    return list(dict.fromkeys(trial["strategy"] for trial in results["trials"] if trial["strategy"] not in known))


def _metric_names(results: Results) -> list[str]:
    """Every single-number test metric of the trials, the deciding one first."""
    names = {name for trial in results["trials"] for name, value in _test(trial).items() if _is_number(value)}
    return [results["metric"], *sorted(names - {results["metric"]})]


def _test(trial: Results) -> Results:
    scores: Results = trial.get("test") or {}
    return scores


def _best_trial(results: Results, strategy: str) -> Results | None:
    """The finished trial of `strategy` with the best validation score."""
    metric = results["metric"]
    scored = [
        (trial["validation"][metric], trial)
        for trial in results["trials"]
        if trial["strategy"] == strategy and _is_number((trial.get("validation") or {}).get(metric))
    ]
    choose = max if results["greater_is_better"] else min
    return choose(scored, key=lambda pair: pair[0])[1] if scored else None


# ------------------------------------------------------------------------------------------ words, numbers


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _score(value: Any) -> str:
    if not _is_number(value):
        return DASH
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def _spread(row: Results) -> str:
    """The distance between a strategy's best and worst seed, where there are several."""
    return _score(row.get("spread")) if (row.get("seeds") or 0) > 1 else DASH


def _count(value: Any) -> str:
    return f"{value:,.0f}" if _is_number(value) else DASH


def _share(value: Any) -> str:
    return f"{100 * value:.3g} %" if _is_number(value) else DASH


def _seconds(value: Any) -> str:
    if not _is_number(value):
        return DASH
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _mebibytes(value: Any) -> str:
    if not _is_number(value):
        return DASH
    mebibytes = value / 2**20
    return f"{mebibytes:,.2f}" if mebibytes < 10 else f"{mebibytes:,.0f}"


def _plain(value: Any) -> str:
    """Any value of a certificate, a configuration or a machine, short and readable."""
    if value is None or isinstance(value, bool):
        return {None: DASH, True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int | str):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _options(value: Any) -> str:
    return ", ".join(f"{name}={_plain(option)}" for name, option in value.items()) if value else DASH


def _direction(results: Results) -> str:
    return "higher is better" if results["greater_is_better"] else "lower is better"


def _model_name(results: Results) -> str:
    """The last two parts of a path, or a hub's owner/name."""
    return "/".join(str(results["model"]).rstrip("/").split("/")[-2:])


def _machine(results: Results) -> list[tuple[str, str]]:
    machine = dict(results.get("machine") or {})
    memory = machine.pop("memory_bytes", None)
    rows = [(_words(name), _plain(value)) for name, value in machine.items()]
    return [*rows, ("memory", f"{_mebibytes(memory)} MiB")] if memory else rows


def _requirements(results: Results) -> str:
    versions = results.get("versions") or {}
    packages = [f"{name}=={version}" for name, version in versions.items() if name != "python"]
    python = [f"# Python {versions['python']}"] if "python" in versions else []
    return "\n".join([*python, *packages])


def _breakable(text: Any) -> Any:
    """A strategy's label that may wrap after its brackets and commas."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[(,])", str(text)))


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


# --------------------------------------------------------------------------------------------------- HTML


def _html(results: Results) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lightsft", "comparison"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    formats = (
        _words,
        _score,
        _spread,
        _count,
        _share,
        _seconds,
        _mebibytes,
        _plain,
        _options,
        _indented,
        _breakable,
    )
    environment.filters.update({function.__name__.lstrip("_"): function for function in formats})
    return environment.get_template("report.html.jinja").render(_page(results))


def _page(results: Results) -> dict[str, Any]:
    """What the template shows besides `results` itself."""
    return {
        "results": results,
        "metric": results["metric"],
        "direction": _direction(results),
        "model_name": _model_name(results),
        "verdict": _verdict(results),
        "progress": _progress(results),
        "winner": results.get("winner") or {},
        "winning_row": _winning_row(results) or {},
        "best_baseline": _best_baseline(results),
        "baseline_words": BASELINE_WORDS,
        "baselines": _baselines(results),
        "bars": {row["strategy"]: _bar(results, row) for row in results["summary"]},
        "bar_width": BAR_WIDTH,
        "without_result": _without_result(results),
        "interval_meaning": _interval_meaning(results),
        "plots": _plots(results),
        "matrices": _matrices(results),
        "matrix_labels": MATRIX_LABELS,
        "metric_names": _metric_names(results),
        "split_roles": _split_roles(),
        "machine": _machine(results),
        "requirements": _requirements(results),
    }


def _bar(results: Results, row: Results) -> dict[str, float] | None:
    """Pixel positions of a score, its interval and the best baseline, on one scale for all strategies."""
    if not _is_number(row.get("score")):
        return None
    low, high = _span([*_score_values(results), *_baseline_values(results)[:1]])
    to_pixel = Scale(low, high, 4, BAR_WIDTH - 4)
    interval = row.get("interval") or (row["score"], row["score"])
    marks = {"low": interval[0], "high": interval[1], "score": row["score"]}
    baseline = _best_baseline(results)
    if baseline is not None:
        marks["baseline"] = baseline[1]
    return {name: round(to_pixel(value), 1) for name, value in marks.items()}


def _score_values(results: Results) -> list[float]:
    values = [value for row in results["summary"] for value in (row.get("score"), *(row.get("interval") or ()))]
    return [value for value in values if _is_number(value)]


def _baseline_values(results: Results) -> list[float]:
    """Test scores of the baselines, the strongest first."""
    values = [_baseline_score(results, scores, "test") for _, scores in _baselines(results)]
    return sorted(filter(_is_number, values), reverse=results["greater_is_better"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest value, a little apart where they are the same."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 0.05
    return low - margin, high + margin


def _matrices(results: Results) -> list[dict[str, Any]]:
    """The best seed's test confusion matrix of each strategy that has one, up to MATRIX_LABELS labels."""
    best = [_best_trial(results, row["strategy"]) for row in results["summary"]]
    with_matrix = [trial for trial in best if trial and 0 < _matrix_size(trial) <= MATRIX_LABELS]
    return [
        {"strategy": trial["strategy"], "seed": trial["seed"], "rows": _matrix_rows(results, trial)}
        for trial in with_matrix
    ]


def _matrix_size(trial: Results) -> int:
    return len(_test(trial).get("confusion_matrix") or [])


def _matrix_rows(results: Results, trial: Results) -> list[dict[str, Any]]:
    matrix = _test(trial)["confusion_matrix"]
    labels = results.get("data", {}).get("labels") or []
    names = labels if len(labels) == len(matrix) else [str(index) for index in range(len(matrix))]
    return [{"label": name, "cells": _matrix_cells(row)} for name, row in zip(names, matrix, strict=True)]


def _matrix_cells(row: Sequence[int]) -> list[dict[str, float]]:
    total = sum(row) or 1
    return [{"count": count, "percent": round(100 * count / total)} for count in row]


# -------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class Scale:
    """A value's pixel: linear from `low` to `high` onto `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


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


def _plots(results: Results) -> list[dict[str, Any]]:
    """Score against trainable parameters, and against peak memory (seconds where no memory was measured)."""
    memory = Cost("peak_bytes", "peak memory (MiB)", unit=2**20)
    measured = any(_is_number(row.get("peak_bytes")) for row in results["summary"])
    second = memory if measured else Cost("seconds", "training time (seconds)")
    costs = (Cost("trainable_parameters", "trainable parameters (log scale)", logarithmic=True), second)
    return [plot for cost in costs if (plot := _plot(results, cost)) is not None]


def _plot(results: Results, cost: Cost) -> dict[str, Any] | None:
    points = [
        {"number": number, "name": row["strategy"], "cost": row[cost.column] / cost.unit, **_vertical(row)}
        for number, row in enumerate(results["summary"], start=1)
        if _is_number(row.get(cost.column)) and _is_number(row.get("score"))
    ]
    if not points:
        return None
    winner = (results.get("winner") or {}).get("strategy")
    axis = _logarithmic_axis(points) if cost.logarithmic else _linear_axis(points)
    named = _place_labels(results, points, axis)
    for point in points:
        point["color"] = ACCENT if point["name"] == winner else MARK
    title = f"Test {_words(results['metric'])} against {cost.title}"
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
    low, high = _span([point["x"] for point in points])
    return Axis(low, high, {"tickCount": 5, "format": ",~f"})


def _vertical_domain(results: Results) -> tuple[float, float]:
    return _span([*_score_values(results), *_baseline_values(results)])


def _specification(results: Results, points: list[dict[str, Any]], axis: Axis, cost_title: str) -> dict[str, Any]:
    """The Vega-Lite plot: baseline lines, interval bars, points, labels. Colours are the page's variables."""
    score_title = f"test {_words(results['metric'])} ({_direction(results)})"
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
    scored = [(name, _baseline_score(results, scores, "test")) for name, scores in _baselines(results)]
    known = [(name, value) for name, value in scored if _is_number(value)]
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


# ----------------------------------------------------------------------------------------------- Markdown


def _markdown(results: Results) -> str:
    sections = [
        f"# {_cell(_model_name(results))}: {_cell(results['task'])}, strategies compared",
        f"**{_cell(_verdict(results))}**",
        _markdown_winner(results),
        f"## Summary\n\n{_markdown_summary(results)}",
        _cell(_interval_meaning(results)),
        _markdown_failures(results),
        _markdown_trials(results),
        f"## Data\n\n{_markdown_data(results)}",
        _markdown_certificate(results),
        f"## Run it again\n\n{_fenced(results['command'], 'sh')}",
        _fenced(_requirements(results), "text") if results.get("versions") else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _markdown_winner(results: Results) -> str:
    winner = results.get("winner")
    if not winner:
        return ""
    where = f"The winner's weights (seed {winner['seed']}) are in {winner['adapter']}."
    return "\n\n".join(_cell(text) for text in (winner.get("note"), where) if text)


def _markdown_summary(results: Results) -> str:
    metric = _words(results["metric"])
    header = [
        "#",
        "strategy",
        f"test {metric} ({_direction(results)})",
        "95 % interval",
        f"validation {metric}",
    ]
    header += [
        "spread over seeds",
        "trainable parameters",
        "share",
        "seconds",
        "peak MiB",
        "file MiB",
        "merges",
    ]
    rows = [[number, *_summary_cells(row)] for number, row in enumerate(results["summary"], start=1)]
    for name, scores in _baselines(results):
        test, validation = (_score(_baseline_score(results, scores, split)) for split in ("test", "validation"))
        rows.append([DASH, f"baseline: {name}", test, DASH, validation, *[DASH] * 7])
    return _markdown_table(header, rows)


def _summary_cells(row: Results) -> list[str]:
    interval = row.get("interval")
    return [
        row["strategy"],
        _score(row.get("score")),
        f"{_score(interval[0])} to {_score(interval[1])}" if interval else DASH,
        _score(row.get("validation_score")),
        _spread(row),
        _count(row.get("trainable_parameters")),
        _share(row.get("trainable_share")),
        _seconds(row.get("seconds")),
        _mebibytes(row.get("peak_bytes")),
        _mebibytes(row.get("adapter_bytes")),
        _plain(row.get("mergeable")),
    ]


def _markdown_failures(results: Results) -> str:
    failed = [trial for trial in results["trials"] if trial["status"] == "failed"]
    if not failed:
        return ""
    rows = [[trial["strategy"], trial["seed"], trial.get("error") or DASH] for trial in failed]
    return f"## Failed trials\n\n{_markdown_table(['strategy', 'seed', 'error'], rows)}"


def _markdown_trials(results: Results) -> str:
    metric, names = results["metric"], _metric_names(results)
    header = [
        "strategy",
        "seed",
        "status",
        f"validation {_words(metric)}",
        *(f"test {_words(name)}" for name in names),
    ]
    rows = [
        [
            trial["strategy"],
            trial["seed"],
            trial["status"],
            _score((trial.get("validation") or {}).get(metric)),
        ]
        + [_score(_test(trial).get(name)) for name in names]
        + [_plain(trial.get("learning_rate")), _seconds(trial.get("seconds")), trial.get("adapter") or DASH]
        for trial in results["trials"]
    ]
    return f"## Trials\n\n{_markdown_table([*header, 'learning rate', 'seconds', 'adapter'], rows)}"


def _markdown_data(results: Results) -> str:
    data = results.get("data") or {}
    rows = [[split, _count(data.get(split)), role] for split, role in _split_roles()]
    labels = ", ".join(map(str, data.get("labels") or [])) or DASH
    return f"Source: {_cell(data.get('source') or DASH)}. Labels: {_cell(labels)}.\n\n" + _markdown_table(
        ["split", "examples", "use"], rows
    )


def _markdown_certificate(results: Results) -> str:
    certificate = results.get("certificate")
    if not certificate:
        return ""
    rows = [[_words(name), _plain(value)] for name, value in certificate.items()]
    return f"## Merge certificate\n\n{_markdown_table(['check', 'value'], rows)}"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    """Text on one line that Markdown shows as it is."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
