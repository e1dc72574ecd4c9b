"""A trained strategy in use: its latency beside the model and merged, and what a merge keeps of its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightsft.comparison.measures.latency import latency
from lightsft.data.reading import Row
from lightsft.errors import LightsftError
from lightsft.export.requantizing import requantize
from lightsft.injection import Injection
from lightsft.quantization import Quantization, quantized_layers
from lightsft.tasks.base import Task
from lightsft.training.evaluate import outcomes_of


def deployment(injection: Injection, task: Task, rows: Sequence[Row], metric: str, batch_size: int) -> dict[str, Any]:
    """{"latency": {"adapter", "merged"}, "merged": {"validation", "requantized"}, "note"}; null where there is none.

    Scores are of these rows. The injection is merged where it can be, and the model stored in codes again where it came
    in codes: save it before. What cannot be done is null, and the note says why; no LightsftError leaves this.
    """
    found: dict[str, Any] = {"latency": {"adapter": None, "merged": None}, "merged": None, "note": None}
    try:
        found["latency"]["adapter"] = latency(injection.backbone, task, rows)
        if injection.mergeable:
            _merge(injection, task, rows, metric, batch_size, found)
        else:
            found["note"] = f"{type(injection.strategy).__name__} adds parts that no weight of the model can hold"
    except LightsftError as error:
        found["note"] = error.found
    return found


def _merge(
    injection: Injection, task: Task, rows: Sequence[Row], metric: str, batch_size: int, found: dict[str, Any]
) -> None:
    """Into `found`, as far as it gets: merged score, merged latency, the score in codes again."""
    backbone, in_words = injection.backbone, injection.backbone.quantization

    def score() -> float | None:
        value = task.score(outcomes_of(backbone, task, rows, batch_size), metric)
        return value if math.isfinite(value) else None

    with injection.disabled():
        in_codes = list(quantized_layers(injection.model))
    injection.merge()
    found["merged"] = {"validation": score(), "requantized": None}
    found["latency"]["merged"] = latency(backbone, task, rows)
    how = Quantization.parse(in_words)
    if how is not None:
        requantize(backbone.model, dict.fromkeys(in_codes, 0.0), how, backbone.compute_dtype)
        found["merged"]["requantized"] = score()
    elif in_words is not None:
        found["note"] = f"{in_words} is a format that weights cannot be stored in again here"
