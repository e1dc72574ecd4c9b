"""Comparisons of two: strategies with each other, strategies with baselines, and who is good enough for less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightsft.comparison.report.bars import difference_bars
from lightsft.comparison.report.facts import baselines
from lightsft.comparison.report.wording import Results, baseline_words, is_number, signed, words

AT_ONCE = 15  # comparisons: all of six strategies
OPTIONAL = {  # columns that are left out where no comparison has a value
    "p_adjusted": "adjusted p",
    "effect_size": "effect size (g)",
    "superiority": "seed pairs won",
    "detectable": "detectable now",
    "seeds_needed": "seeds needed",
    "examples_needed": "examples needed",
}


def against_strategies(results: Results) -> list[Results]:
    """Strategies with each other."""
    return [one for one in results.get("comparisons") or [] if one.get("against") != "baseline"]


def against_baselines(results: Results) -> list[Results]:
    """Strategies with baselines."""
    return [one for one in results.get("comparisons") or [] if one.get("against") == "baseline"]


def split_by_winner(results: Results) -> tuple[list[Results], list[Results]]:
    """Comparisons of strategies that are shown at once, and the rest.

    All at once where they are few; of many, those of the winner.
    """
    winner = (results.get("winner") or {}).get("strategy")
    pairs = against_strategies(results)
    of_winner = [one for one in pairs if winner in _both(one)]
    rest = [one for one in pairs if winner not in _both(one)]
    return (of_winner, rest) if of_winner and len(pairs) > AT_ONCE else ([*of_winner, *rest], [])


def table(comparisons: Sequence[Results]) -> dict[str, Any]:
    """The rows with their bars, and the columns that have values."""
    columns = [name for name in OPTIONAL if any(is_number(one.get(name)) for one in comparisons)]
    bars = difference_bars(comparisons)
    return {
        "rows": [{**one, "bar": bar} for one, bar in zip(comparisons, bars, strict=True)],
        "columns": [(name, OPTIONAL[name]) for name in columns],
    }


def interval_words(results: Results, one: Results) -> str:
    """`+2.1 [1.2, 3.0]`, in the unit of differences."""
    if not is_number(one.get("difference")):
        return "–"
    low, high = one.get("interval") or (None, None)
    between = f" [{signed(results, low)}, {signed(results, high)}]" if is_number(low) and is_number(high) else ""
    return f"{signed(results, one['difference'])}{between}"


def outcomes_of(results: Results, strategy: str) -> dict[str, list[str]]:
    """The other strategies by how `strategy` did against them: better, worse, undecided."""
    turned = {"better": "worse", "worse": "better"}
    found: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for one in against_strategies(results):
        outcome = one.get("outcome") or "undecided"
        if one.get("first") == strategy:
            found[outcome].append(str(one.get("second")))
        elif one.get("second") == strategy:
            found[turned.get(outcome, outcome)].append(str(one.get("first")))
    return found


def outcome_against(results: Results, strategy: str, baseline: str) -> str | None:
    """How a strategy did against a baseline; None where they were not compared."""
    rows = [_against(one, baseline) for one in against_baselines(results) if baseline in _both(one)]
    return next((outcome for name, outcome in rows if name == strategy), None)


def _both(one: Results) -> tuple[Any, Any]:
    return one.get("first"), one.get("second")


def unbeaten_baselines(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each baseline the strategies that are not shown to beat it, with how they did: undecided or worse.

    By the comparisons where they were made; of a run without them, by the interval of the strategy's score.
    """
    compared = against_baselines(results)
    found = []
    for name, scores in baselines(results):
        if any(name in _both(one) for one in compared):
            rows = [_against(one, name) for one in compared if name in _both(one)]
        else:
            rows = [_by_interval(results, row, scores) for row in results["summary"]]
        lost = [(strategy, outcome) for strategy, outcome in rows if outcome != "better"]
        found += [(name, lost)] if lost else []
    return found


def _against(one: Results, baseline: str) -> tuple[str, str]:
    turned = {"better": "worse", "worse": "better"}
    outcome = one.get("outcome") or "undecided"
    if one.get("second") == baseline:
        return str(one.get("first")), outcome
    return str(one.get("second")), turned.get(outcome, outcome)


def _by_interval(results: Results, row: Results, scores: Results) -> tuple[str, str]:
    value = (scores.get("test") or {}).get(results["metric"])
    if not is_number(value) or not is_number(row.get("score")):
        return row["strategy"], "better"  # nothing to say
    low, high = row.get("interval") or (row["score"], row["score"])
    if low <= value <= high:
        return row["strategy"], "undecided"
    return row["strategy"], "worse" if (value > row["score"]) == results["greater_is_better"] else "better"


def alerts(results: Results) -> list[str]:
    """A sentence for each baseline that some strategy is not shown to beat."""
    sentences = []
    for name, lost in unbeaten_baselines(results):
        worse = [strategy for strategy, outcome in lost if outcome == "worse"]
        open_ = [strategy for strategy, outcome in lost if outcome == "undecided"]
        parts = [f"worse: {', '.join(worse)}"] if worse else []
        parts += [f"not shown to be better: {', '.join(open_)}"] if open_ else []
        sentences.append(f"Against {baseline_words(name)}, {'; '.join(parts)}.")
    return sentences


def non_inferior_rows(results: Results) -> list[tuple[str, str]]:
    """By cost, the cheapest strategy that is good enough."""
    cheapest = (results.get("non_inferior") or {}).get("cheapest") or {}
    named = {"peak_bytes": "peak memory", "adapter_bytes": "file size", "seconds": "training time"}
    return [(named.get(cost, words(cost)), label) for cost, label in cheapest.items() if label]
