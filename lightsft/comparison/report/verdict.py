"""The outcome in sentences: what the first screen says."""

from __future__ import annotations

from collections.abc import Sequence

from lightsft.comparison.cautions import NOT_TUNED, ONE_SEED
from lightsft.comparison.report.facts import best_baseline, progress, winning_row
from lightsft.comparison.report.pairwise import outcome_against, outcomes_of
from lightsft.comparison.report.wording import Results, baseline_words, is_number, score, words


def verdict(results: Results) -> str:
    """The outcome in one sentence."""
    winner = results.get("winner")
    if not winner:
        return f"There is no winner: {progress(results)}."
    row = winning_row(results)
    scored = _scored(results, row) if row else ""
    return f"{winner['strategy']} won on validation{scored}."


def _scored(results: Results, row: Results) -> str:
    metric = words(results["metric"])
    interval = row.get("interval")
    between = f" (95 % interval {score(interval[0])} to {score(interval[1])})" if interval else ""
    return f" and has a test {metric} of {score(row.get('score'))}{between}{_against_baseline(results, row)}"


def _against_baseline(results: Results, row: Results) -> str:
    baseline = best_baseline(results)
    if baseline is None or not is_number(row.get("score")):
        return ""
    name, value = baseline
    text = f" against {score(value)} for {baseline_words(name)}"
    compared = outcome_against(results, row["strategy"], name)
    if compared is not None:
        ends = {"undecided": ", and is not shown to be better", "worse": ", which is better, so tuning did not pay"}
        return text + ends.get(compared, "")
    low, high = row.get("interval") or (row["score"], row["score"])
    if low <= value <= high:
        return text + ", which lies inside that interval, so there is no clear gain"
    if (value > row["score"]) == results["greater_is_better"]:
        return text + ", which is better, so tuning did not pay"
    return text


def standing(results: Results) -> str:
    """How the winner did against the other strategies; empty where they were not compared."""
    winner = (results.get("winner") or {}).get("strategy")
    found = outcomes_of(results, winner) if winner else {}
    parts = [f"beats {listed(found['better'])}"] if found.get("better") else []
    parts += [f"loses to {listed(found['worse'])}"] if found.get("worse") else []
    parts += [f"shows no detectable difference from {listed(found['undecided'])}"] if found.get("undecided") else []
    return f"On the test split {winner} {', and '.join(parts)}." if parts else ""


def listed(names: Sequence[str]) -> str:
    """`a, b and c`; of many, the first few and how many more."""
    if len(names) > 5:
        return f"{', '.join(names[:4])} and {len(names) - 4} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def good_enough(results: Results) -> str:
    """The answer to: which is the cheapest that is good enough? Empty where it was not asked."""
    text = str((results.get("non_inferior") or {}).get("verdict") or "").strip()
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def merged(results: Results) -> str:
    """What was merged, and whether it may be used."""
    winner = results.get("winner")
    if not winner:
        return ""
    if not winner.get("merged"):
        return "Nothing was merged."
    strategy, seed = winner.get("merged_strategy") or winner["strategy"], winner.get("merged_seed")
    which = "The winner" if strategy == winner["strategy"] else strategy
    return f"{which}{'' if seed is None else f' (seed {seed})'} was merged and {_certified(results)}."


def _certified(results: Results) -> str:
    certificate = results.get("certificate")
    if not certificate:
        return "has no certificate"
    return "its certificate passed" if certificate.get("passed") else "its certificate FAILED: do not use it"


def warnings(results: Results) -> list[str]:
    """What limits the conclusions: what the run says, and what follows from how it was run."""
    own = [str(one) for one in results.get("warnings") or []]
    trials = results["trials"]
    finished = {trial["strategy"] for trial in trials if trial["status"] == "finished"}
    if finished and max((row.get("seeds") or 0 for row in results["summary"]), default=2) == 1:
        own.append(ONE_SEED)
    if trials and not results.get("search"):
        own.append(NOT_TUNED)
    return list(dict.fromkeys(own))
