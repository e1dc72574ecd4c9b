"""`report.html`: tables, inline interval bars, plots as inline SVG, confusion matrices; one file, no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightsft.comparison.report.facts import (
    BASELINE_WORDS,
    baseline_values,
    baselines,
    best_baseline,
    best_trial,
    interval_meaning,
    metric_names,
    progress,
    score_values,
    span,
    split_roles,
    test,
    verdict,
    winning_row,
    without_result,
)
from lightsft.comparison.report.plots import plots
from lightsft.comparison.report.scale import Scale
from lightsft.comparison.report.wording import (
    Results,
    breakable,
    count,
    direction,
    first_rows,
    indented,
    is_number,
    machine,
    mebibytes,
    model_name,
    options,
    plain,
    requirements,
    score,
    seconds,
    share,
    spread,
    words,
)

MATRIX_LABELS = 30  # a larger confusion matrix is left to results.json


BAR_WIDTH = 110  # pixels of the summary table's interval bars


def html_page(results: Results) -> str:
    """The whole page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lightsft.comparison", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    formats = (
        words,
        score,
        spread,
        count,
        share,
        seconds,
        mebibytes,
        plain,
        options,
        indented,
        breakable,
        first_rows,
    )
    environment.filters.update({function.__name__.lstrip("_"): function for function in formats})
    return environment.get_template("report.html.jinja").render(_page(results))


def _page(results: Results) -> dict[str, Any]:
    """What the template shows besides `results` itself."""
    return {
        "results": results,
        "metric": results["metric"],
        "direction": direction(results),
        "model_name": model_name(results),
        "verdict": verdict(results),
        "progress": progress(results),
        "winner": results.get("winner") or {},
        "winning_row": winning_row(results) or {},
        "best_baseline": best_baseline(results),
        "baseline_words": BASELINE_WORDS,
        "baselines": baselines(results),
        "bars": {row["strategy"]: _bar(results, row) for row in results["summary"]},
        "bar_width": BAR_WIDTH,
        "without_result": without_result(results),
        "interval_meaning": interval_meaning(results),
        "plots": plots(results),
        "matrices": _matrices(results),
        "matrix_labels": MATRIX_LABELS,
        "metric_names": metric_names(results),
        "split_roles": split_roles(),
        "machine": machine(results),
        "requirements": requirements(results),
    }


def _bar(results: Results, row: Results) -> dict[str, float] | None:
    """Pixel positions of a score, its interval and the best baseline, on one scale for all strategies."""
    if not is_number(row.get("score")):
        return None
    low, high = span([*score_values(results), *baseline_values(results)[:1]])
    to_pixel = Scale(low, high, 4, BAR_WIDTH - 4)
    interval = row.get("interval") or (row["score"], row["score"])
    marks = {"low": interval[0], "high": interval[1], "score": row["score"]}
    baseline = best_baseline(results)
    if baseline is not None:
        marks["baseline"] = baseline[1]
    return {name: round(to_pixel(value), 1) for name, value in marks.items()}


def _matrices(results: Results) -> list[dict[str, Any]]:
    """The best seed's test confusion matrix of each strategy that has one, up to MATRIX_LABELS labels."""
    best = [best_trial(results, row["strategy"]) for row in results["summary"]]
    with_matrix = [trial for trial in best if trial and 0 < _matrix_size(trial) <= MATRIX_LABELS]
    return [
        {"strategy": trial["strategy"], "seed": trial["seed"], "rows": _matrix_rows(results, trial)}
        for trial in with_matrix
    ]


def _matrix_size(trial: Results) -> int:
    return len(test(trial).get("confusion_matrix") or [])


def _matrix_rows(results: Results, trial: Results) -> list[dict[str, Any]]:
    matrix = test(trial)["confusion_matrix"]
    labels = results.get("data", {}).get("labels") or []
    names = labels if len(labels) == len(matrix) else [str(index) for index in range(len(matrix))]
    return [{"label": name, "cells": _matrix_cells(row)} for name, row in zip(names, matrix, strict=True)]


def _matrix_cells(row: Sequence[int]) -> list[dict[str, float]]:
    total = sum(row) or 1
    return [{"count": count, "percent": round(100 * count / total)} for count in row]
