"""Every cost of every strategy in one table; a column without any value is left out."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from lightsft.comparison.report.wording import (
    Results,
    count,
    is_number,
    kilojoules,
    mebibytes,
    milliseconds,
    plain,
    score,
    seconds,
    share,
)

Show = Callable[[Any], str]


def cost_table(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles of the columns, and each strategy with its cells."""
    measured = [(row["strategy"], _measured(results, row)) for row in results["summary"]]
    columns = [column for column in COLUMNS if any(is_number(values.get(column)) for _, values in measured)]
    rows = [(name, [COLUMNS[column][1](values.get(column)) for column in columns]) for name, values in measured]
    if any(values["frozen_cache"] for _, values in measured):
        rows = [
            (name, [*cells, plain(values["frozen_cache"])])
            for (name, cells), (_, values) in zip(rows, measured, strict=True)
        ]
        return [*(COLUMNS[column][0] for column in columns), "computed once"], rows
    return [COLUMNS[column][0] for column in columns], rows


COLUMNS: dict[str, tuple[str, Show]] = {
    "trainable_parameters": ("trainable parameters", count),
    "total_parameters": ("all parameters", count),
    "trainable_share": ("share", share),
    "peak_bytes": ("peak memory (MiB)", mebibytes),
    "seconds": ("seconds", seconds),
    "training_seconds": ("of them training", seconds),
    "tokens": ("tokens", count),
    "tokens_per_second": ("tokens/s", count),
    "seconds_to_target": ("seconds to target", seconds),
    "joules": ("energy (kJ)", kilojoules),
    "adapter_bytes": ("file (MiB)", mebibytes),
    "latency_ms": ("latency (ms)", milliseconds),
    "p90_ms": ("its 90th percentile", milliseconds),
    "merged_latency_ms": ("merged latency (ms)", milliseconds),
    "merged_score": ("merged, validation score", score),
    "requantized": ("merged and requantized", score),
    "coverage": ("coverage", share),
}


def _measured(results: Results, row: Results) -> dict[str, Any]:
    """A row of the summary with what only its trials know."""
    of_it = [t for t in results["trials"] if t["strategy"] == row["strategy"] and t["status"] == "finished"]
    known = {name: _median(of_it, name) for name in ("total_parameters", "training_seconds", "tokens", "coverage")}
    known["p90_ms"] = _first(of_it, "latency", "adapter", "p90_ms")
    known["merged_score"] = _first(of_it, "merged", "validation")
    known["requantized"] = _first(of_it, "merged", "requantized")
    known["frozen_cache"] = next((t["frozen_cache"] for t in of_it if t.get("frozen_cache")), None)
    return {**known, **{name: value for name, value in row.items() if value is not None}}


def _median(trials: list[Results], name: str) -> float | None:
    values = [trial[name] for trial in trials if is_number(trial.get(name))]
    return median(values) if values else None


def _first(trials: list[Results], *path: str) -> Any:
    """The first number at a path into the trials."""
    for trial in trials:
        value: Any = trial
        for name in path:
            value = (value or {}).get(name)
        if is_number(value):
            return value
    return None
