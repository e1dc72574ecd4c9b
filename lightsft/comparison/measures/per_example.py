"""Which examples strategies disagree on: their scores example by example, the most disagreed first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightsft.data.reading import Row
from lightsft.tasks.base import Array, Task

MOST = 300
SHOWN = 400  # characters of a text


def examples(
    task: Task, rows: Sequence[Row], outcomes: Mapping[str, Sequence[Array]], metric: str, *, most: int = MOST
) -> dict[str, Any]:
    """The examples of the report's explorer. `outcomes` has one array per seed for each label, all over these rows.

    scores: the metric of the one row, its mean over the seeds; answers: of the first seed, where outcomes hold them;
    disagreement: the standard deviation of the scores over the labels. "metric" is what was scored: where the given one
    says nothing of a single row, the loss or the accuracy.
    """
    chosen = metric_of_rows(task, [one for seeds in outcomes.values() for one in seeds], metric)
    scores = {
        label: np.mean([task.scores_of_each(one, chosen) for one in seeds], axis=0) for label, seeds in outcomes.items()
    }
    answers = {label: said for label, seeds in outcomes.items() if (said := task.answers_in(seeds[0])) is not None}
    disagreement = np.nan_to_num(np.std(list(scores.values()), axis=0))
    order = np.argsort(-disagreement, kind="stable")[:most]
    return {
        "metric": chosen,
        "greater_is_better": task.greater_is_better(chosen),
        "columns": list(outcomes),
        "rows": [
            {
                "row": int(row),
                "text": _cut(task.text_of(rows[row])),
                "target": _cut(task.target_of(rows[row])),
                "scores": {label: _number(values[row]) for label, values in scores.items()},
                "answers": {label: said[row] for label, said in answers.items()},
                "disagreement": float(disagreement[row]),
            }
            for row in order
        ],
    }


def metric_of_rows(task: Task, outcomes: Sequence[Array], metric: str) -> str:
    """The metric, if it says something of single rows; else the loss, the accuracy, any that does.

    It does where every row has one, and not all have the same, unless that is also the score of all of them together.
    """
    names = [name for name in ("loss", "accuracy") if name in task.metric_names]
    for name in dict.fromkeys([metric, *names, *task.metric_names]):
        values = np.concatenate([task.scores_of_each(one, name) for one in outcomes])
        differs = (values != values[0]).any() or values[0] == task.score(outcomes[0], name)
        if np.isfinite(values).all() and differs:
            return name
    return metric


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
