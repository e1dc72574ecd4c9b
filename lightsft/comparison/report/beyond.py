"""What a test score does not say: changed texts, groups, forgetting."""

from __future__ import annotations

from typing import Any

from lightsft.comparison.report.wording import Results, count, is_number, score, signed, words

Table = tuple[list[str], list[tuple[str, list[str]]]]  # titles of the columns, and each strategy with its cells


def robustness_table(results: Results) -> Table | None:
    """Scores on changed texts, with the difference to the plain ones."""
    changes = _keys(results, "robustness")
    if not changes:
        return None
    rows = [
        (row["strategy"], [score(row.get("score")), *(_changed(results, row, name) for name in changes)])
        for row in results["summary"]
    ]
    return ["as they are", *map(words, changes)], rows


def _changed(results: Results, row: Results, name: str) -> str:
    value = (row.get("robustness") or {}).get(name)
    if not is_number(value) or not is_number(row.get("score")):
        return score(value)
    return f"{score(value)} ({signed(results, value - row['score'])})"


def group_table(results: Results) -> Table | None:
    """Scores by group, with the number of test examples in each."""
    groups = _keys(results, "groups")
    if not groups:
        return None
    counts = _group_counts(results)
    titles = [f"{name} ({count(counts[name])})" if name in counts else name for name in groups]
    rows = [
        (row["strategy"], [*(score((row.get("groups") or {}).get(name)) for name in groups), _gap(results, row)])
        for row in results["summary"]
    ]
    return [*titles, "largest gap"], rows


def _gap(results: Results, row: Results) -> str:
    values = [value for value in (row.get("groups") or {}).values() if is_number(value)]
    return signed(results, max(values) - min(values)).lstrip("+") if len(values) > 1 else "–"


def _group_counts(results: Results) -> dict[str, Any]:
    for trial in results["trials"]:
        if trial.get("groups"):
            return {name: group.get("count") for name, group in trial["groups"].items()}
    return {}


def forgetting_table(results: Results) -> Table | None:
    """Loss on neutral text before and after."""
    rows = []
    for row in results["summary"]:
        found = [t["forgetting"] for t in results["trials"] if t["strategy"] == row["strategy"] and t.get("forgetting")]
        if found:
            before, after = (_mean([one.get(name) for one in found]) for name in ("before", "after"))
            rise = f"{row['forgetting']:+.3f}" if is_number(row.get("forgetting")) else "–"
            rows.append((row["strategy"], [score(before), score(after), rise, count(found[0].get("tokens"))]))
    return (["before", "after", "rise", "tokens"], rows) if rows else None


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return sum(known) / len(known) if known else None


def _keys(results: Results, column: str) -> list[str]:
    return list(dict.fromkeys(name for row in results["summary"] for name in row.get(column) or {}))


def group_column(results: Results) -> str:
    """The column that groups are read from."""
    return str(((results.get("data") or {}).get("groups") or {}).get("column") or "group")
