"""What a baseline leaves: outcomes per example, so that it is scored and tested like any strategy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightsft.tasks.base import Array, Task


@dataclass(frozen=True)
class Baseline:
    """validation, test: outcomes in the form of the task's own, a row per example. about: what it is, in a line."""

    validation: Array
    test: Array
    about: str
    seconds: float


def score_of(task: Task, metric: str) -> Callable[[Array], tuple[float, ...]]:
    """Outcomes to what is better where it is greater: the metric, among equals the loss. What is undefined is worst."""
    names = [metric, *(["loss"] if "loss" in task.metric_names else [])]
    signs = [1.0 if task.greater_is_better(name) else -1.0 for name in names]

    def score(outcomes: Array) -> tuple[float, ...]:
        values = [sign * task.score(outcomes, name) for sign, name in zip(signs, names, strict=True)]
        return tuple(-math.inf if math.isnan(value) else value for value in values)

    return score
