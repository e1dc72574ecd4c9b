"""Outcomes and logits of a backbone on rows, outside of training."""

from __future__ import annotations

import contextlib
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
    order = sorted(range(len(features)), key=lambda index: task.length(features[index]))
    found = []
    with torch.no_grad(), evaluating(backbone.model):
        for first in range(0, len(order), batch_size):
            batch = task.collate([features[i] for i in order[first : first + batch_size]], backbone.tokenizer)
            inputs = {name: value.to(backbone.model.device) for name, value in batch.items()}
            found.append(observed(task, backbone.model, inputs)[1].cpu())
    outcomes = torch.cat(found)
    outcomes[torch.tensor(order)] = outcomes.clone()
    return task.by_row(outcomes.numpy(), features, backbone.tokenizer)


def observed(
    task: Task,
    model: Any,
    batch: dict[str, Tensor],
    writer: Any = None,
    around: contextlib.AbstractContextManager[None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, outcomes) of a batch; `writer` is the model that generates, where `model` wraps it.

    around: what is entered for the forward pass, and left before anything is generated.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    announce(writer or model, batch)
    with around or contextlib.nullcontext():
        outputs = task.forward(model, inputs, labels)
    outcomes = task.outcomes(outputs, labels)
    written = task.generations(writer or model, inputs, labels)
    return task.loss(outputs, labels), outcomes if written is None else torch.cat([outcomes, written.float()], dim=1)


def announce(model: Any, batch: dict[str, Tensor]) -> None:
    """Tell parts of the model that ask for it (`announce`) what the coming forward pass is about, labels included."""
    for part in model.children():
        told = getattr(part, "announce", None)
        if told is not None:
            told(batch)
