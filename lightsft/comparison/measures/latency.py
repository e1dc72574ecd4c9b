"""How long one example takes: milliseconds of the task's own forward pass with a batch of one."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from lightsft.backbone import Backbone
from lightsft.data.reading import Row
from lightsft.dry_run import evaluating
from lightsft.tasks.base import Task

WARM_UPS = 3
REPEATS = 20
LOOKED_AT = 200  # rows, of which the one of median length is taken


def latency(backbone: Backbone, task: Task, rows: Sequence[Row], *, repeats: int = REPEATS) -> dict[str, float]:
    """{"median_ms", "p90_ms"} of `repeats` passes over the row of median length, after WARM_UPS others.

    From the tensors on the device to the outputs there; tokenizing, and moving them, is left out.
    """
    features = sorted(task.encode(rows[:LOOKED_AT], backbone.tokenizer), key=task.length)
    batch = task.collate([features[len(features) // 2]], backbone.tokenizer)
    inputs = {name: value.to(backbone.model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    seconds = []
    with torch.no_grad(), evaluating(backbone.model):
        for _ in range(WARM_UPS + repeats):
            _finish(backbone.model.device)
            began = time.perf_counter()
            task.forward(backbone.model, inputs, labels)
            _finish(backbone.model.device)
            seconds.append(time.perf_counter() - began)
    measured = 1000 * np.array(seconds[WARM_UPS:])
    return {"median_ms": float(np.median(measured)), "p90_ms": float(np.quantile(measured, 0.9))}


def _finish(device: torch.device) -> None:
    """Wait for what an accelerator was given to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
