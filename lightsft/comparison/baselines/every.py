"""Every baseline that a task and its data allow."""

from __future__ import annotations

from lightsft.backbone import Backbone
from lightsft.comparison.baselines.baseline import Baseline
from lightsft.comparison.baselines.linear_probe import linear_probe
from lightsft.comparison.baselines.majority import majority
from lightsft.comparison.baselines.tfidf import tfidf
from lightsft.comparison.baselines.untuned import untuned
from lightsft.data.splits import Splits
from lightsft.tasks.base import Task


def all_baselines(
    task: Task, splits: Splits, backbone: Backbone, batch_size: int, metric: str | None = None
) -> dict[str, Baseline]:
    """Those that apply, by name. `metric` chooses penalties on the validation rows, by default the task's own."""
    wanted = metric or task.metric
    found = {
        "untuned": untuned(task, splits, backbone, batch_size),
        "majority": majority(task, splits),
        "linear_probe": linear_probe(task, splits, backbone, batch_size, wanted),
        "tfidf": tfidf(task, splits, wanted),
    }
    return {name: one for name, one in found.items() if one is not None}
