"""The backbone as it was loaded: its own head if the checkpoint has one, else a random one."""

from __future__ import annotations

import time

from lightsft.backbone import Backbone
from lightsft.comparison.baselines.baseline import Baseline
from lightsft.data.splits import Splits
from lightsft.tasks.base import Task
from lightsft.training.evaluate import outcomes_of


def untuned(task: Task, splits: Splits, backbone: Backbone, batch_size: int) -> Baseline:
    """What every strategy starts from."""
    began = time.perf_counter()
    validation, test = (outcomes_of(backbone, task, rows, batch_size) for rows in (splits.validation, splits.test))
    head = "a head of random weights" if backbone.head & backbone.fresh else "the head that the checkpoint has"
    about = "the model without training" + (f", with {head}" if backbone.head else "")
    return Baseline(validation, test, about, time.perf_counter() - began)
