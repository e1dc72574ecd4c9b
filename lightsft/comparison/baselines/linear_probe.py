"""A linear model on what enters the frozen backbone's head: how much of the task the pretraining solved already.

x' = (x - mean) / standard deviation, over the rows that it is fitted on; logistic or ridge regression of x'
"""

from __future__ import annotations

import time

import numpy as np

from lightsft.backbone import Backbone
from lightsft.comparison.baselines.baseline import Baseline, score_of
from lightsft.comparison.baselines.fitting import Given, choose
from lightsft.comparison.baselines.head_inputs import head_inputs
from lightsft.data.splits import Splits, at_most
from lightsft.tasks.base import Array, Task

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C
MOST_ROWS = 5000


def linear_probe(
    task: Task, splits: Splits, backbone: Backbone, batch_size: int, metric: str, *, most_rows: int = MOST_ROWS
) -> Baseline | None:
    """None for tasks that say something else than labels or numbers, and for models without a head for them."""
    began = time.perf_counter()
    if not backbone.head or task.truth(splits.train[:1]) is None:
        return None
    train = at_most(splits.train, most_rows, task.key)
    given = []
    for rows in (train, splits.validation, splits.test):
        features, truth = head_inputs(backbone, task, rows, batch_size), task.truth(rows)
        if features is None or truth is None:
            return None
        given.append(Given(features, truth))
    mean, deviation = given[0].features.mean(axis=0), _deviation(given[0].features)
    scaled = [Given((one.features - mean) / deviation, one.truth) for one in given]
    classes, score = len(getattr(task, "labels", ())), score_of(task, metric)
    fitted = choose(scaled[0], scaled[1], STRENGTHS, score, classes=classes, weights=task.label_weights)
    test = np.column_stack([fitted.predict(scaled[2].features), scaled[2].truth])
    about = (
        f"{'logistic' if classes > 1 else 'ridge'} regression on the {len(mean)} numbers that enter the frozen model's "
        f"head, C = {fitted.strength:g}, fitted on {len(train)} of {len(splits.train)} training rows"
    )
    return Baseline(fitted.validation, test, about, time.perf_counter() - began)


def _deviation(features: Array) -> Array:
    """Of each column, 1 for one that is constant."""
    found = features.std(axis=0)
    return np.where(found > 1e-12 * np.abs(features).max(initial=1.0), found, 1.0)
