"""What a comparison showed, as sentences and values that both forms of the report use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightsft.comparison.report.wording import Results, count, is_number


def progress(results: Results) -> str:
    """How many trials are finished, failed, or not run yet."""
    trials = results["trials"]
    counts = {status: sum(trial["status"] == status for trial in trials) for status in ("failed", "pending")}
    finished = len(trials) - sum(counts.values())
    rest = [f"{count} {status}" for status, count in counts.items() if count]
    return ", ".join([f"{finished} of {len(trials)} trials finished", *rest])


def interval_meaning(results: Results) -> str:
    """What the interval covers, and what it does not."""
    examples = (results.get("data") or {}).get("test")
    seeds = max((row.get("seeds") or 0 for row in results["summary"]), default=0)
    which = f"the {count(examples)} test examples" if is_number(examples) else "the test examples"
    text = f"Scores are means over seeds. Intervals cover 95 %, over the choice of {which}"
    if seeds == 1:
        return f"{text} alone: they say how far a score would move with other examples of the same kind."
    spread = "the spread is the highest seed's score minus the lowest's"
    return f"{text} and over the {seeds} seeds: how far a score would move with others of either; {spread}."


def split_roles() -> list[tuple[str, str]]:
    """What each split is for."""
    return [
        ("train", "fits the weights"),
        ("validation", "chooses settings, the best seed and the winner"),
        ("test", "is scored once per trial and chooses nothing"),
    ]


def baselines(results: Results) -> list[tuple[str, Results]]:
    """The baselines that were scored, by name."""
    return [(name, scores) for name, scores in (results.get("baselines") or {}).items() if scores]


def baseline_score(results: Results, scores: Results, split: str) -> Any:
    """The deciding metric of a baseline on a split, or None."""
    return (scores.get(split) or {}).get(results["metric"])


def best_baseline(results: Results) -> tuple[str, float] | None:
    """Name and test score of the strongest baseline, None without one."""
    scored = [(name, baseline_score(results, scores, "test")) for name, scores in baselines(results)]
    known = [(name, value) for name, value in scored if is_number(value)]
    choose = max if results["greater_is_better"] else min
    return choose(known, key=lambda pair: pair[1]) if known else None


def winning_row(results: Results) -> Results | None:
    """The winner's line in the summary."""
    winner = results.get("winner") or {}
    return next((row for row in results["summary"] if row["strategy"] == winner.get("strategy")), None)


def without_result(results: Results) -> list[str]:
    """The strategies that have trials but no line in the summary, in the order they ran."""
    known = {row["strategy"] for row in results["summary"]}
    return list(dict.fromkeys(trial["strategy"] for trial in results["trials"] if trial["strategy"] not in known))


def metric_names(results: Results) -> list[str]:
    """Every single-number test metric of the trials, the deciding one first."""
    names = {name for trial in results["trials"] for name, value in test(trial).items() if is_number(value)}
    return [results["metric"], *sorted(names - {results["metric"]})]


def test(trial: Results) -> Results:
    """A trial's test metrics; empty when it failed."""
    scores: Results = trial.get("test") or {}
    return scores


def best_trial(results: Results, strategy: str) -> Results | None:
    """The finished trial of `strategy` with the best validation score."""
    metric = results["metric"]
    scored = [
        (trial["validation"][metric], trial)
        for trial in results["trials"]
        if trial["strategy"] == strategy and is_number((trial.get("validation") or {}).get(metric))
    ]
    choose = max if results["greater_is_better"] else min
    return choose(scored, key=lambda pair: pair[0])[1] if scored else None


def score_values(results: Results) -> list[float]:
    """Every score and interval end in the summary."""
    values = [value for row in results["summary"] for value in (row.get("score"), *(row.get("interval") or ()))]
    return [value for value in values if is_number(value)]


def baseline_values(results: Results) -> list[float]:
    """Test scores of the baselines, the strongest first."""
    values = [baseline_score(results, scores, "test") for _, scores in baselines(results)]
    return sorted(filter(is_number, values), reverse=results["greater_is_better"])


def span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest value, a little apart where they are the same."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 0.05
    return low - margin, high + margin


def hashes(results: Results) -> list[tuple[str, str]]:
    """Of files, splits and the model, by what they are of."""
    rows = []
    for name, value in (results.get("hashes") or {}).items():
        inside = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name} {key}".strip(), str(one)) for key, one in inside]
    return rows


def label_width(results: Results) -> int:
    """Letters of the longest label, at most 24: how wide the tables' first column should be."""
    return min(24, max((len(str(trial["strategy"])) for trial in results["trials"]), default=8))
