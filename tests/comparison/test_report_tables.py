"""Tables of the report: summary, comparisons, costs, trials, confusion matrices, what is beyond the score."""

from pathlib import Path

import pytest

from lightsft.comparison.report import beyond, pairwise
from lightsft.comparison.report.costs import cost_table
from tests.comparison.report_pages import Page, chat, comparison, failed, markdown_tables, report, row, trial
from tests.comparison.sample_results import sample


def test_every_figure_of_the_summary_is_shown(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    figures = ["0.716", "0.686 to 0.746", "0.706", "0.004", "304,512", "0.65 %", "88.1", "790", "0.57", "yes"]
    line = [" ".join(cell.split()) for cell in page.tables[0][1]]
    assert line == ["1 adapter winner", *figures]
    cells = [cell.strip() for cell in markdown_tables(markdown)[0][2]]
    assert cells == ["1", "adapter", *figures]
    assert [line[:2] for line in page.tables[0][3:]] == [
        ["baseline: untuned", "0.412"],
        ["baseline: majority", "0.452"],
    ]


def test_every_trial_is_shown_with_its_scores_and_options(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    trials = next(table for table in page.tables if "adapter" in table[0])
    assert [line[:2] for line in trials[1:]] == [
        ["adapter", "0"],
        ["adapter", "1"],
        ["lora", "0"],
        ["lora", "1"],
    ]
    assert trials[0][3:7] == ["validation accuracy", "test accuracy", "test loss", "test macro f1"]
    assert trials[2][3:9] == ["0.710", "0.720", "0.700", "0.670", "0.0005", "rank=8"]
    assert "trials/lora-seed1/adapter" in markdown


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    empty = dict.fromkeys(("interval", "spread", "peak_bytes", "adapter_bytes", "seconds", "trainable_share"))
    summary = [row("adapter", 0.7, None, **empty), row("lora", 0.6, None, **empty)]
    markdown, html, page = report(comparison(summary=summary, baselines={}), tmp_path)
    assert "None" not in page.text + markdown
    assert [cell.strip() for cell in page.tables[0][1][2:10]] == ["–", "0.690", *["–"] * 6]
    assert "<figure" not in html


def test_a_failed_trial_is_shown_with_its_error(tmp_path: Path) -> None:
    trials = [
        trial("lora", 0, 0.7),
        failed("ia3", "TargetError: no module named `k|v`\nWhat to do: targets='linear'"),
    ]
    markdown, _, page = report(comparison(trials=trials, summary=[row("lora", 0.7)]), tmp_path)
    assert "TargetError: no module named `k|v` What to do: targets='linear'" in page.text
    assert "Without a result: ia3." in page.text
    assert "1 of 2 trials finished, 1 failed" in page.text
    assert r"TargetError: no module named \`k\|v\` What to do" in markdown


def test_the_confusion_matrix_is_the_one_of_the_best_seed(tmp_path: Path) -> None:
    results = comparison()
    results["trials"][1]["test"]["confusion_matrix"] = [[3, 1], [0, 0]]
    _, _, page = report(results, tmp_path)
    assert "adapter, seed 1" in page.text
    assert page.tables[1] == [["", "bad", "good"], ["bad", "375 %", "125 %"], ["good", "00 %", "00 %"]]


def test_the_best_seed_of_a_chat_task_has_the_lowest_validation_loss(tmp_path: Path) -> None:
    results = chat()
    for one in results["trials"]:
        one["test"]["confusion_matrix"] = [[1, 0], [0, 1]]
    _, _, page = report(results, tmp_path)
    assert "lora, seed 1" in page.text


def test_a_huge_confusion_matrix_is_left_to_the_json(tmp_path: Path) -> None:
    results = comparison()
    results["data"]["labels"] = [f"label {index}" for index in range(31)]
    for one in results["trials"]:
        one["test"]["confusion_matrix"] = [[1] * 31] * 31
    _, html, page = report(results, tmp_path)
    assert "Confusion matrices of 31 labels are too large for a page; results.json holds them." in page.text
    assert len(html) < 100_000


def table_of(page: Page, title: str) -> list[list[str]]:
    """The first table with this title of a column, without line breaks."""
    table = next(table for table in page.tables if title in [" ".join(cell.split()) for cell in table[0]])
    return [[" ".join(cell.split()) for cell in line] for line in table]


def test_comparisons_show_difference_p_effect_and_verdict(sample_report) -> None:
    markdown, _, page = sample_report
    results, _ = sample()
    header, *lines = table_of(page, "adjusted p")
    assert header[:3] == ["verdict", "difference (points) and 95 % interval", "adjusted p"]
    assert len(lines) == 10
    winner = results["winner"]["strategy"]
    assert all(winner in line[0] for line in lines[:4])
    beaten = next(one for one in results["comparisons"] if (one["first"], one["second"]) == (winner, "prefix"))
    line = next(line for line in lines if line[0] == beaten["verdict"])
    low, high = (f"{100 * end:+.1f}" for end in beaten["interval"])
    assert line[1] == f"{100 * beaten['difference']:+.1f} [{low}, {high}]"
    assert line[2] == "0.004"
    assert beaten["verdict"].replace("[", r"\[").replace("]", r"\]") in markdown


def test_a_column_of_comparisons_without_values_is_left_out(tmp_path: Path) -> None:
    pairs = [{"first": "adapter", "second": "lora", "difference": -0.02, "p_adjusted": 0.00001, "interval": None}]
    _, _, page = report(comparison(comparisons=pairs), tmp_path)
    header, line = table_of(page, "adjusted p")
    assert header == ["verdict", "difference (accuracy) and 95 % interval", "adjusted p"]
    assert line == ["adapter against lora", "−0.020", "< 0.001"]


def test_the_cheapest_that_is_good_enough_is_named_with_its_margin(sample_report) -> None:
    words = "Good enough is at most 1.0 points worse than lora(rank=16), which holds for lora(rank=16)."
    assert words in sample_report[2].text
    assert "by trainable parameters lora(rank=16), by peak memory lora(rank=16)" in sample_report[2].text


def test_costs_have_a_column_for_whatever_was_measured(sample_report) -> None:
    markdown, _, page = sample_report
    header, *lines = table_of(page, "tokens/s")
    assert header[-3:] == ["merged latency (ms)", "merged, validation score", "coverage"]
    assert "merged and requantized" not in header
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert by_name["prefix"]["seconds to target"] == "–"
    assert by_name["lora(rank=16)"]["trainable parameters"] == "589,824"
    joules = next(row["joules"] for row in sample()[0]["summary"] if row["strategy"] == "full")
    assert float(by_name["full"]["energy (kJ)"]) == pytest.approx(joules / 1000, rel=0.005)
    assert "energy (kJ)" in markdown


def test_what_was_computed_once_is_said_beside_the_costs() -> None:
    trials = [trial("adapter", 0, 0.7, frozen_cache="blocks 0 to 9"), trial("lora", 0, 0.7)]
    titles, rows = cost_table(comparison(trials=trials))
    assert titles[-1] == "computed once"
    assert [cells[-1] for _, cells in rows] == ["blocks 0 to 9", "–"]


def test_robustness_shows_what_is_lost() -> None:
    results = comparison(unit={"scale": 100, "name": "points"})
    results["summary"][0]["robustness"] = {"typos": 0.616}
    titles, rows = beyond.robustness_table(results)
    assert titles == ["as they are", "typos"]
    assert rows[0] == ("adapter", ["0.716", "0.616 (−10.0)"])
    assert rows[1] == ("lora", ["0.709", "–"])


def test_groups_show_their_sizes_and_the_largest_gap() -> None:
    results = comparison(unit={"scale": 100, "name": "points"})
    results["trials"][0]["groups"] = {"de": {"count": 40, "accuracy": 0.6}, "en": {"count": 60, "accuracy": 0.8}}
    results["summary"][0]["groups"] = {"de": 0.6, "en": 0.8}
    titles, rows = beyond.group_table(results)
    assert titles == ["de (40)", "en (60)", "largest gap"]
    assert rows[0] == ("adapter", ["0.600", "0.800", "20.0"])


def test_forgetting_is_the_mean_before_and_after() -> None:
    results = comparison()
    for one, after in zip(results["trials"][:2], (3.5, 3.7), strict=True):
        one["forgetting"] = {"before": 3.0, "after": after, "tokens": 1000}
    results["summary"][0]["forgetting"] = 0.6
    _, rows = beyond.forgetting_table(results)
    assert rows == [("adapter", ["3.000", "3.600", "+0.600", "1,000"])]


def test_every_trial_of_the_search_is_listed_with_why_it_failed(sample_report) -> None:
    markdown, _, page = sample_report
    _, *lines = table_of(page, "why it failed")
    assert len(lines) == 40
    failed_lines = [line for line in lines if line[2] == "failed"]
    assert len(failed_lines) == 5
    assert all(line[-1] == "FloatingPointError: the loss is NaN at step 31" for line in failed_lines)
    chosen = [line[0] for line in lines if line[0].endswith("chosen")]
    assert len(chosen) == 5
    assert "search 4" in markdown
    spaces = table_of(page, "space")
    assert spaces[1][1] == "learning rate: 1e-05 to 0.03 (log)rank: 8, 16, 32"


def test_of_many_comparisons_those_of_the_winner_are_shown_at_once() -> None:
    names = ["adapter", *(f"s{number}" for number in range(6))]
    pairs = [{"first": a, "second": b} for number, a in enumerate(names) for b in names[:number]]
    shown, rest = pairwise.split_by_winner(comparison(comparisons=pairs))
    assert len(shown) == 6
    assert len(rest) == 15
    assert all("adapter" in one.values() for one in shown)
    few = [one for one in pairs if "s5" not in one.values()]
    assert [len(part) for part in pairwise.split_by_winner(comparison(comparisons=few))] == [15, 0]
    assert [len(part) for part in pairwise.split_by_winner(comparison(comparisons=pairs, winner=None))] == [21, 0]
