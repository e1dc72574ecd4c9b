"""One answer to everything, the best that the training rows suggest."""

from __future__ import annotations

import time

from lightsft.comparison.baselines.baseline import Baseline
from lightsft.data.splits import Splits
from lightsft.tasks.base import Task


def majority(task: Task, splits: Splits) -> Baseline | None:
    """The most frequent label, the mean: what the task calls the best constant answer; None where it knows none."""
    began = time.perf_counter()
    found = [task.constant_outcomes(splits.train, rows) for rows in (splits.validation, splits.test)]
    validation, test = found
    if validation is None or test is None:
        return None
    about = f"the same answer to everything, the best one for the {len(splits.train)} training rows"
    return Baseline(validation, test, about, time.perf_counter() - began)
