"""Rows to what a model says of them, in the order of the rows: the loop that every task's `predict` is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightsft.data.reading import Row
from lightsft.dry_run import evaluating
from lightsft.errors import DataError
from lightsft.tasks.texts import filled

if TYPE_CHECKING:
    from lightsft.tasks.base import Task

Said = dict[str, Any]


def said_of(task: Task, model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int) -> list[Said]:
    """What the model says of each row; features of similar length share a batch."""
    features = task.to_predict(rows, tokenizer)
    order = sorted(range(len(features)), key=lambda index: task.length(features[index]))
    found: list[Said] = [{} for _ in features]
    with torch.no_grad(), evaluating(model):
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            part = [features[number] for number in numbers]
            inputs = {name: x.to(model.device) for name, x in task.collate(part, tokenizer).items()}
            labels = inputs.pop("labels")
            outputs = task.forward(model, inputs, labels)
            for number, said in zip(numbers, task.said(outputs, labels, part, tokenizer), strict=True):
                found[number] = said
    return task.said_of_rows(found, features, rows)


def by_row(found: Sequence[Said], features: Sequence[dict[str, Any]]) -> Iterator[list[tuple[Said, dict[str, Any]]]]:
    """For each row what was said of its features, and those."""
    rows: dict[int, list[tuple[Said, dict[str, Any]]]] = {}
    for said, feature in zip(found, features, strict=True):
        rows.setdefault(feature["_row"], []).append((said, feature))
    yield from (rows[number] for number in sorted(rows))


def shares(labels: Sequence[str], probabilities: Tensor) -> list[dict[str, float]]:
    """{label: probability} of each row of (batch, labels)."""
    return [dict(zip(labels, map(float, row), strict=True)) for row in probabilities.float().cpu()]


def require_filled(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Raise DataError naming the first row that lacks something to predict from."""
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not filled(row, column):
                there = "" if column in row else f"; its columns are {', '.join(map(repr, row))}"
                raise DataError(
                    f"row {number} has nothing in {column!r}{there}",
                    expected=f"something in {' and '.join(map(repr, columns))} in every row to predict",
                    todo="fill it, or remove the row" if not there else "rename the column, or name it with --text",
                )
