"""`report.html`: the templates of `page/`, filled; one file that requests nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from typing import Any

from lightsft.comparison.report import (
    bars,
    beyond,
    calibration,
    costs,
    curves,
    explorer,
    facts,
    few_shot,
    matrices,
    pairwise,
    pareto,
    searches,
    verdict,
    wording,
)
from lightsft.comparison.report.wording import Results

FORMATS = (
    wording.words,
    wording.baseline_words,
    wording.score,
    wording.spread,
    wording.count,
    wording.share,
    wording.seconds,
    wording.mebibytes,
    wording.probability,
    wording.plain,
    wording.short,
    wording.two_digits,
    wording.options,
    wording.setting,
    wording.indented,
    wording.breakable,
    wording.first_rows,
)


def html_page(results: Results, examples: Mapping[str, Any] | None = None) -> str:
    """The whole page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lightsft.comparison.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: function for function in FORMATS})
    values = _first_screen(results) | _tables(results) | _drawn(results) | _origin(results) | _script(results, examples)
    return environment.get_template("report.html.jinja").render(results=results, metric=results["metric"], **values)


def _first_screen(results: Results) -> dict[str, Any]:
    return {
        "model_name": wording.model_name(results),
        "direction": wording.direction(results),
        "verdict": verdict.verdict(results),
        "standing": verdict.standing(results),
        "good_enough": verdict.good_enough(results),
        "merged": verdict.merged(results),
        "warnings": verdict.warnings(results),
        "alerts": pairwise.alerts(results),
        "progress": facts.progress(results),
        "winner": results.get("winner") or {},
        "winning_row": facts.winning_row(results) or {},
        "best_baseline": facts.best_baseline(results),
    }


def _tables(results: Results) -> dict[str, Any]:
    pairs, others = pairwise.split_by_winner(results)
    return {
        "baselines": facts.baselines(results),
        "bars": bars.score_bars(results),
        "bar_width": bars.WIDTH,
        "label_width": facts.label_width(results),
        "without_result": facts.without_result(results),
        "interval_meaning": facts.interval_meaning(results),
        "pairs": pairwise.table(pairs),
        "others": pairwise.table(others),
        "against": pairwise.table(pairwise.against_baselines(results)),
        "non_inferior_rows": pairwise.non_inferior_rows(results),
        "interval_words": partial(pairwise.interval_words, results),
        "signed": partial(wording.signed, results),
        "unit_name": wording.unit_name(results),
        "costs": costs.cost_table(results),
        "robustness": beyond.robustness_table(results),
        "groups": beyond.group_table(results),
        "group_column": beyond.group_column(results),
        "forgetting": beyond.forgetting_table(results),
        "matrices": matrices.matrices(results),
        "matrix_labels": matrices.MOST_LABELS,
        "metric_names": facts.metric_names(results),
    }


def _drawn(results: Results) -> dict[str, Any]:
    return {
        "plots": pareto.pareto_plots(results),
        "curves": curves.curve_plots(results),
        "searches": searches.searches(results),
        "few_shot": few_shot.few_shot_plot(results),
        "calibrations": calibration.calibrations(results),
    }


def _origin(results: Results) -> dict[str, Any]:
    return {
        "split_roles": facts.split_roles(),
        "machine": wording.machine(results),
        "requirements": wording.requirements(results),
        "hashes": facts.hashes(results),
    }


def _script(results: Results, examples: Mapping[str, Any] | None) -> dict[str, Any]:
    """The explorer with the one script of the page; a page without examples has none, and allows none."""
    from markupsafe import Markup

    shown = explorer.explorer(results, examples)
    script = files("lightsft.comparison.report").joinpath("page", "script.js").read_text(encoding="utf-8")
    text = script if shown else ""
    return {"explorer": shown, "script": Markup(text), "policy": explorer.policy(text)}
