"""Plots of the report: fronts, learning curves, the search, fewer examples, calibration."""

import re
from pathlib import Path

import numpy as np
import pytest

from lightsft.comparison.report import calibration, curves, drawing, pareto, searches
from lightsft.comparison.report.axes import logarithmic_axis
from tests.comparison.report_pages import comparison, markdown_tables, report, row, summary_names, trial

NEAR = {"untuned": {"test": {"accuracy": 0.64}}, "majority": {"test": {"accuracy": 0.65}}}


def test_a_baseline_far_away_is_told_and_not_drawn(tmp_path: Path) -> None:
    _, html, page = report(comparison(), tmp_path)
    assert "The strongest baseline, majority, has 0.452: too far away to be drawn." in page.text
    assert ">majority</text>" not in html


def test_the_plots_show_strategies_and_baselines_and_follow_the_theme(tmp_path: Path) -> None:
    _, html, page = report(comparison(baselines=NEAR), tmp_path)
    plots = re.findall(r'<svg viewBox.*?role="img" aria-label="([^"]*)">(.*?)</svg>', html, flags=re.DOTALL)
    assert [title for title, _ in plots] == [
        "Test accuracy against trainable parameters (log scale)",
        "Test accuracy against peak memory (MiB)",
        "Test accuracy against training time (seconds)",
        "Test accuracy against file size (MiB)",
    ]
    for _, svg in plots:
        for text in ("adapter", "lora", "untuned", "majority"):
            assert f">{text}</text>" in svg
        assert not re.search(r'(?:fill|stroke)="#', svg)
    assert "@media (prefers-color-scheme: dark)" in html
    assert ("html", {"lang": "en"}) in page.elements


def test_zero_trainable_parameters_stand_at_a_tick_of_their_own(tmp_path: Path) -> None:
    summary = [row("lora", 0.7, 147_456), row("nothing", 0.5, 0)]
    _, html, _ = report(comparison(summary=summary), tmp_path)
    plot = html[html.index("log scale") : html.index("</svg>", html.index("log scale"))]
    assert ">0</text>" in plot
    assert ">100k</text>" in plot
    assert ">nothing</text>" in plot
    assert "NaN" not in html
    assert "Infinity" not in html


def test_all_strategies_with_zero_parameters_can_be_drawn(tmp_path: Path) -> None:
    _, html, _ = report(comparison(summary=[row("a", 0.7, 0), row("b", 0.5, 0)]), tmp_path)
    assert ">0</text>" in html
    assert "NaN" not in html


def test_twelve_long_labels_are_numbered_in_the_plots(tmp_path: Path) -> None:
    names = [f"lora(rank={rank},targets=attention)" for rank in range(1, 13)]
    summary = [row(name, 0.7 - index / 500, 10_000 * 2**index) for index, name in enumerate(names)]
    trials = [trial(name, 0, 0.7) for name in names]
    markdown, html, page = report(comparison(summary=summary, trials=trials), tmp_path)
    assert summary_names(page)[:12] == names
    assert [line[1].strip() for line in markdown_tables(markdown)[0][2:14]] == names
    plot = html[html.index("<figure") : html.index("</figure>")]
    assert all(f">{number}</text>" in plot for number in range(1, 13))
    assert "Numbers are those of the summary." in plot


def test_labels_do_not_cover_each_other(tmp_path: Path) -> None:
    summary = [row(f"lora-{index}", 0.7 - index / 50, 100_000 * (index + 1)) for index in range(4)]
    _, html, _ = report(comparison(summary=summary, baselines={}), tmp_path)
    plot = html[html.index("<figure") : html.index("</figure>")]
    found = re.findall(r'translate\(([\d.]+),([\d.]+)\)"[^>]*>(?:lora-)\d</text>', plot)
    places = [(float(x), float(y)) for x, y in found]
    assert len(places) == 4
    for first in places:
        for second in places:
            assert first == second or abs(first[0] - second[0]) > 40 or abs(first[1] - second[1]) >= 13


def test_the_front_is_what_no_other_point_dominates() -> None:
    random = np.random.default_rng(0)
    for better in (True, False):
        costs, scores = random.integers(0, 6, 12).tolist(), random.integers(0, 6, 12).tolist()
        sign = 1 if better else -1
        points = list(zip(costs, [sign * score for score in scores], strict=True))
        dominated = {i for i, p in enumerate(points) for q in points if q[0] <= p[0] and q[1] >= p[1] and q != p}
        found = pareto.front(costs, scores, greater_is_better=better)
        assert set(found) == set(range(12)) - dominated
        assert [costs[i] for i in found] == sorted(costs[i] for i in found)


def test_dominated_strategies_are_muted_and_the_front_is_named(tmp_path: Path) -> None:
    summary = [row("best", 0.8, 1_000_000), row("cheap", 0.7, 1000), row("bad", 0.6, 100_000)]
    _, html, _ = report(comparison(summary=summary), tmp_path)
    figure = html[html.index("<figure") : html.index("</figure>")]
    assert "<strong>cheap, best</strong>" in figure
    texts = {name: hue for hue, name in re.findall(r'<text[^>]*fill="var\(--(\w+)\)"[^>]*>([^<]*)</text>', figure)}
    assert (texts["cheap"], texts["best"], texts["bad"]) == ("ink", "ink", "muted")


def test_axes_are_chosen_without_a_script(sample_report) -> None:
    _, html, page = sample_report
    choices = [
        attributes for tag, attributes in page.elements if tag == "input" and attributes.get("name") == "cost-axis"
    ]
    assert len(choices) == 8
    assert [("checked" in choice) for choice in choices] == [True] + [False] * 7
    for number in range(1, 9):
        assert f"input:nth-of-type({number}):checked ~ .chosen > figure:nth-of-type({number})" in html


def curve(*points: tuple[int, float], seconds: float = 1.0) -> list[dict[str, float]]:
    return [{"step": step, "score": score, "seconds": seconds * step, "tokens": 10 * step} for step, score in points]


def test_a_learning_curve_is_the_mean_with_the_lowest_and_highest_seed() -> None:
    seeds = [curve((10, 0.5), (20, 0.7)), curve((10, 0.6), (20, 0.9), seconds=3.0)]
    (line,) = curves.lines(seeds, "score", "seconds")
    assert [point["x"] for point in line] == pytest.approx([20, 40])
    assert [point["mean"] for point in line] == pytest.approx([0.55, 0.8])
    assert [(point["low"], point["high"]) for point in line] == [(0.5, 0.6), (0.7, 0.9)]


def test_a_learning_curve_ends_where_the_first_seed_ended() -> None:
    seeds = [curve((10, 0.5), (20, 0.7), (30, 0.1)), curve((10, 0.6), (20, 0.9))]
    (line,) = curves.lines(seeds, "score", "step")
    assert [point["x"] for point in line] == [10, 20]


def test_seeds_without_common_steps_are_lines_of_their_own() -> None:
    found = curves.lines([curve((10, 0.5), (20, 0.7)), curve((11, 0.6), (21, 0.9))], "score", "step")
    assert [[point["mean"] for point in line] for line in found] == [[0.5, 0.7], [0.6, 0.9]]


def test_points_without_a_score_are_left_out_of_a_curve() -> None:
    points = [*curve((10, 0.5), (20, 0.7)), {"step": 30, "score": None, "seconds": 30.0}]
    (line,) = curves.lines([points], "score", "step")
    assert len(line) == 2
    assert curves.lines([points], "loss", "step") == []


def test_learning_curves_show_the_target_and_a_legend(sample_report) -> None:
    _, html, page = sample_report
    assert "The dashed line is the target, 0.800." in page.text
    found = re.findall(r'role="img" aria-label="([^"]*)"', html)
    for along in ("steps", "tokens", "seconds"):
        assert f"Validation accuracy by {along}" in found
    assert "Training loss by steps" in found
    start = html.index('id="curves"')
    legend = html[html.index('<ul class="legend">', start) : html.index("</ul>", start)]
    assert re.findall(r"</svg>([^<]*)</li>", legend) == ["lora(rank=16)", "full", "adapter", "ia3", "prefix"]


def test_a_search_draws_stopped_trials_at_their_last_score_and_failed_ones_without() -> None:
    assert searches.last_score({"status": "finished", "validation": 0.5, "curve": [[1, 0.4]]}) == 0.5
    assert searches.last_score({"status": "pruned", "validation": None, "curve": [[1, 0.4], [2, 0.3]]}) == 0.3
    assert searches.last_score({"status": "failed", "validation": None, "curve": [[1, 0.4]]}) is None


def test_a_search_over_choices_alone_has_no_plot_but_a_table() -> None:
    trials = [{"number": 0, "status": "finished", "parameters": {"targets": "all"}, "validation": 0.5}]
    (found,) = searches.searches(
        comparison(search=[{"strategy": "lora", "trials": trials, "chosen": {"targets": "all"}}])
    )
    assert found["svg"] is None
    assert found["trials"][0]["chosen"]
    assert searches.space_words({"choices": [8, "all"]}) == "8, all"
    assert searches.space_words({"low": 1, "high": 4}) == "1 to 4"


def test_reliability_bins_are_pooled_over_seeds_by_their_counts() -> None:
    random = np.random.default_rng(1)
    confidence = [random.uniform(0.5, 1.0, size) for size in (30, 50)]
    right = [random.random(len(one)) < one for one in confidence]
    bins = [
        [{"count": len(c), "confidence": c.mean(), "accuracy": r.mean()}]
        for c, r in zip(confidence, right, strict=True)
    ]
    (found,) = calibration.pooled(bins)
    assert found["count"] == 80
    assert found["confidence"] == pytest.approx(np.concatenate(confidence).mean())
    assert found["accuracy"] == pytest.approx(np.concatenate(right).mean())


def test_many_strategies_are_told_apart_by_dashes() -> None:
    looks = {(drawing.color(number), tuple(drawing.dash(number))) for number in range(20)}
    assert len(looks) == 20


@pytest.mark.parametrize(
    ("values", "shown"),
    [((1e-5, 3e-4), ["1e-5", "1e-4"]), ((0.1, 80), ["0.1", "1", "10"]), ((5e4, 2e7), ["100k", "10M"])],
)
def test_ticks_of_a_log_axis_are_written_so_that_they_can_be_read(
    values: tuple[float, float], shown: list[str]
) -> None:
    axis = logarithmic_axis(values)
    assert axis.places == pytest.approx(np.log10(values))
    points = {"data": {"values": [{"x": place, "y": 1} for place in axis.places]}, "mark": "point"}
    drawn = drawing.svg([points | {"encoding": {"x": axis.encoding("x", "cost")}}], "a plot")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert set(shown) <= set(texts), texts


def test_the_name_of_a_baseline_stands_where_no_interval_crosses_it() -> None:
    results = comparison(baselines={"untuned": {"test": {"accuracy": 0.7}}})
    y = 100.0
    left, right = [(15.0, y, 0.0, 230.0)], [(315.0, y, 0.0, 230.0)]
    assert pareto._baseline_lines(results, left)[0]["align"] == "right"
    assert pareto._baseline_lines(results, right)[0]["align"] == "left"
    marks = [(20.0, 100.0, 50.0, 150.0)]
    assert pareto._crossings((0, 90, 60, 104), marks) == 1
    assert pareto._crossings((270, 90, 328, 104), marks) == 0
    assert pareto._crossings((0, 30, 60, 44), marks) == 0
