"""The first screen: who won, against what, how surely, and what limits it."""

from pathlib import Path
from typing import Any

import pytest

from lightsft.comparison.report import pairwise, verdict
from tests.comparison.report_pages import chat, comparison, report, row, summary_names
from tests.comparison.sample_results import sample


def test_the_verdict_names_winner_score_baseline_merge_and_certificate(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    verdict = (
        "adapter won on validation and has a test accuracy of 0.716 (95 % interval 0.686 to 0.746) against"
        " 0.452 for always answering the most frequent label."
    )
    assert verdict in page.text
    assert verdict in markdown
    merged = "lora (seed 0) was merged and its certificate passed."
    assert merged in page.text
    assert merged in markdown


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (0.5, "against 0.500 for the untuned model."),
        (0.72, "which lies inside that interval, so there is no clear gain."),
        (0.9, "which is better, so tuning did not pay."),
    ],
)
def test_the_verdict_says_when_the_baseline_is_not_beaten(tmp_path: Path, baseline: float, words: str) -> None:
    baselines = {"untuned": {"validation": None, "test": {"accuracy": baseline}}}
    markdown, _, page = report(comparison(baselines=baselines), tmp_path)
    assert words in page.text
    assert words in markdown


def test_a_failed_certificate_is_said_in_the_verdict(tmp_path: Path) -> None:
    certificate = {"passed": False, "inputs": 64, "largest_logit_difference": 3.0}
    markdown, _, page = report(comparison(certificate=certificate), tmp_path)
    assert "its certificate FAILED: do not use it." in page.text
    assert "its certificate FAILED: do not use it." in markdown
    assert ("dd", {"class": "bad"}) in page.elements


def test_a_chat_task_prefers_the_lower_loss(tmp_path: Path) -> None:
    markdown, _, page = report(chat(), tmp_path)
    assert "lower is better" in page.text
    assert "higher is better" not in page.text + markdown
    verdict = "has a test loss of 2.150 (95 % interval 2.120 to 2.180) against 2.900 for echo."
    assert verdict in page.text
    assert "Nothing was merged." in page.text
    assert "Strongest baseline 2.900 echo" in page.text
    assert summary_names(page)[:2] == ["lora", "full"]
    assert "Confusion" not in page.text


def test_a_chat_task_worse_than_the_untuned_model_did_not_pay(tmp_path: Path) -> None:
    baselines = {"untuned": {"validation": {"loss": 1.0}, "test": {"loss": 1.0}}}
    _, _, page = report(chat() | {"baselines": baselines}, tmp_path)
    assert "against 1.000 for the untuned model, which is better, so tuning did not pay." in page.text


def test_one_seed_is_said_to_tell_nothing_about_seeds(tmp_path: Path) -> None:
    summary = [row("adapter", 0.7, seeds=1, spread=0.0)]
    markdown, _, page = report(comparison(summary=summary), tmp_path)
    words = "One seed each: nothing here says how far another seed would move a score."
    assert words in page.text
    assert words in markdown
    assert page.tables[0][1][4] == "–"


def test_what_intervals_cover_is_said(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    words = "Intervals cover 95 %, over the choice of the 1,000 test examples and over the 2 seeds"
    assert words in page.text
    assert words in markdown


def compared(first: str, second: str, outcome: str, against: str = "strategy") -> dict[str, Any]:
    return {"first": first, "second": second, "outcome": outcome, "against": against, "difference": 0.01}


def test_the_winner_stands_to_the_others_as_the_comparisons_say(tmp_path: Path) -> None:
    pairs = [compared("adapter", "lora", "better"), compared("full", "adapter", "better")]
    pairs += [compared("ia3", "adapter", "undecided"), compared("full", "lora", "better")]
    markdown, _, page = report(comparison(comparisons=pairs), tmp_path)
    words = "On the test split adapter beats lora, and loses to full, and shows no detectable difference from ia3."
    assert words in page.text
    assert words in markdown


def test_a_strategy_that_does_not_beat_a_baseline_is_said_before_the_summary(tmp_path: Path) -> None:
    pairs = [compared("adapter", "tfidf", "better", "baseline"), compared("lora", "tfidf", "worse", "baseline")]
    pairs += [compared("tfidf", "full", "undecided", "baseline"), compared("tfidf", "ia3", "better", "baseline")]
    baselines = {"tfidf": {"test": {"accuracy": 0.71}, "validation": None}}
    markdown, _, page = report(comparison(comparisons=pairs, baselines=baselines), tmp_path)
    words = "Against TF-IDF + logistic regression, worse: lora, ia3; not shown to be better: full."
    assert words in page.text[: page.text.index("Summary")]
    assert words in markdown[: markdown.index("## Summary")]


def test_without_comparisons_the_interval_decides_whether_a_baseline_is_beaten() -> None:
    results = comparison(baselines={"tfidf": {"test": {"accuracy": 0.683}}})
    assert pairwise.alerts(results) == ["Against TF-IDF + logistic regression, not shown to be better: lora."]
    results = comparison(baselines={"tfidf": {"test": {"accuracy": 0.742}}})
    words = "Against TF-IDF + logistic regression, worse: lora; not shown to be better: adapter."
    assert pairwise.alerts(results) == [words]
    lower = chat() | {"baselines": {"untuned": {"test": {"loss": 2.3}}}}
    assert pairwise.alerts(lower) == ["Against the untuned model, worse: full."]


def test_no_alert_where_every_baseline_is_beaten() -> None:
    assert pairwise.alerts(comparison()) == []


def test_the_answer_about_the_cheapest_is_a_sentence() -> None:
    assert verdict.good_enough({"non_inferior": {"verdict": "lora is within 1 point"}}) == "lora is within 1 point."
    assert verdict.good_enough({"non_inferior": {"verdict": "Done."}}) == "Done."
    assert verdict.good_enough({}) == ""


def test_settings_that_were_not_searched_for_are_said_to_be_defaults(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    words = "learning rates are the defaults or what was given, not tuned"
    assert words in page.text
    assert words in markdown
    assert not any(words in text for text in verdict.warnings(sample()[0]))


def test_warnings_and_skipped_strategies_stand_before_the_summary(sample_report) -> None:
    markdown, _, page = sample_report
    for words in ("the validation split has 400 examples", "vera was skipped: TargetError: its matrices have 3 shapes"):
        assert words in page.text[: page.text.index("Best validation accuracy first")]
        assert words in markdown[: markdown.index("## Summary")]


def test_many_names_are_cut_to_the_first_few() -> None:
    assert verdict.listed(["a"]) == "a"
    assert verdict.listed(["a", "b", "c"]) == "a, b and c"
    assert verdict.listed([*"abcdefg"]) == "a, b, c, d and 3 more"


@pytest.mark.parametrize(
    ("outcome", "end"),
    [
        ("better", "0.720 for TF-IDF + logistic regression."),
        ("undecided", "0.720 for TF-IDF + logistic regression, and is not shown to be better."),
        ("worse", "0.720 for TF-IDF + logistic regression, which is better, so tuning did not pay."),
    ],
)
def test_a_comparison_with_the_baseline_decides_more_than_the_interval(outcome: str, end: str) -> None:
    baselines = {"tfidf": {"test": {"accuracy": 0.72}, "validation": None}}
    pairs = [compared("adapter", "tfidf", outcome, "baseline")]
    assert verdict.verdict(comparison(baselines=baselines, comparisons=pairs)).endswith(end)
