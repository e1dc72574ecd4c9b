"""Confusion matrices of test answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightsft.comparison.report.facts import best_trial, test
from lightsft.comparison.report.wording import Results

MOST_LABELS = 30  # a larger confusion matrix is left to results.json


def matrices(results: Results) -> list[dict[str, Any]]:
    """The best seed's test confusion matrix of each strategy that has one, up to MOST_LABELS labels."""
    best = [best_trial(results, row["strategy"]) for row in results["summary"]]
    with_matrix = [trial for trial in best if trial and 0 < _size(trial) <= MOST_LABELS]
    return [
        {"strategy": trial["strategy"], "seed": trial["seed"], "rows": _rows(results, trial)} for trial in with_matrix
    ]


def _size(trial: Results) -> int:
    return len(test(trial).get("confusion_matrix") or [])


def _rows(results: Results, trial: Results) -> list[dict[str, Any]]:
    matrix = test(trial)["confusion_matrix"]
    labels = (results.get("data") or {}).get("labels") or []
    names = labels if len(labels) == len(matrix) else [str(index) for index in range(len(matrix))]
    return [{"label": name, "cells": _cells(row)} for name, row in zip(names, matrix, strict=True)]


def _cells(row: Sequence[int]) -> list[dict[str, float]]:
    total = sum(row) or 1
    return [{"count": count, "percent": round(100 * count / total)} for count in row]
