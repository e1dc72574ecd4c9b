"""Outcomes and logits of a backbone on rows, outside of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightsft.backbone import Backbone
from lightsft.data.reading import Row
from lightsft.dry_run import evaluating
from lightsft.tasks.base import Metrics, Task


def batches(task: Task, rows: Sequence[Row], tokenizer: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches of the rows, in order."""
    features = task.encode(rows, tokenizer)
    for first in range(0, len(features), batch_size):
        yield task.collate(features[first : first + batch_size], tokenizer)


def score_model(backbone: Backbone, task: Task, rows: Sequence[Row], batch_size: int) -> Metrics:
    """Every metric of the backbone as it is now, whatever it carries."""
    return task.metrics(outcomes_of(backbone, task, rows, batch_size))


def outcomes_of(backbone: Backbone, task: Task, rows: Sequence[Row], batch_size: int) -> np.ndarray[Any, Any]:
    """(rows, width): what happened for each row, in their order."""
    features = task.encode(rows, backbone.tokenizer)
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    found = []
    with torch.no_grad(), evaluating(backbone.model):
        for first in range(0, len(order), batch_size):
            batch = task.collate([features[i] for i in order[first : first + batch_size]], backbone.tokenizer)
            labels = batch.pop("labels").to(backbone.model.device)
            outputs = backbone.model(**{name: value.to(backbone.model.device) for name, value in batch.items()})
            found.append(task.outcomes(outputs.logits, labels).cpu())
    outcomes = torch.cat(found)
    outcomes[torch.tensor(order)] = outcomes.clone()
    array: np.ndarray[Any, Any] = outcomes.numpy()
    return array
