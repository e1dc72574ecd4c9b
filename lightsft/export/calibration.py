"""Rows to distil a strategy on, and rows to score it on before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightsft.adapter_files import read_settings
from lightsft.data.reading import Row, read_rows
from lightsft.errors import ConfigurationError, DataError, MergeError
from lightsft.export.as_lora import AsLoRA
from lightsft.export.certificate import Batch, kept_positions, logits_of
from lightsft.export.distilling import HELD_OUT, Distilled, distil
from lightsft.export.held_out import HeldOut, as_task, held_out
from lightsft.export.inputs import inputs_to_compare, score
from lightsft.export.low_rank_fit import Fit
from lightsft.injection import Injection
from lightsft.primitives import Unfreezing
from lightsft.tasks import Task
from lightsft.training.evaluate import batches

MOST_IN_A_BATCH, BATCHES = 8, 2 * HELD_OUT  # at least so many batches, so that some are kept from each fit


class Calibration:
    """The rows of a file, and what the strategy makes of those to score.

    These are the rows that its run held out, or else every fifth of the file. They are no part of the fit.
    """

    def __init__(self, source: Path, injection: Injection, path: Path) -> None:
        self.injection, self.path = injection, path
        chosen = _task(source, injection)
        self.rows = read_rows(path)
        chosen.check(self.rows, str(path))
        held = held_out(source)
        self.scored_on = "the rows that its run held out"
        if held is None:
            self.scored_on = f"every fifth row of {path}"
            held = HeldOut(chosen, self.rows[HELD_OUT - 1 :: HELD_OUT])
        scored = {chosen.key(row) for row in held.rows}
        self.rows = [row for row in self.rows if chosen.key(row) not in scored]
        _require_enough(self.rows, path)
        self.task, self.held = chosen, held
        self.inputs = inputs_to_compare(injection.backbone, held)
        self.score, self.logits = score(injection.backbone, held), logits_of(injection.backbone, self.inputs)

    def as_lora(self, rank: int, whole: frozenset[str]) -> AsLoRA:
        """The factors that come nearest. Raises MergeError if no layer's do any good."""
        backbone = self.injection.backbone
        size = min(MOST_IN_A_BATCH, len(self.rows) // BATCHES)
        found = distil(
            self.injection, [_inputs(b) for b in batches(self.task, self.rows, backbone.tokenizer, size)], rank
        )
        converted = AsLoRA(backbone, rank=rank, whole=whole)
        converted.fits.update(_fits(found))
        converted.unchanged.extend(f"{name}.weight" for name in found.regressions.keys() - converted.fits.keys())
        if not converted.fits:
            raise MergeError(
                f"no LoRA of rank {rank} brings the base nearer to {type(self.injection.strategy).__name__} on rows of "
                f"{self.path} that it was not fitted to",
                expected="a strategy whose effect is linear in what the layers read, at least in part",
                todo="give more rows, or ship the adapter folder as it is",
            )
        self.tokens = found.rows
        return converted

    def compared(self, made: Injection) -> dict[str, Any]:
        """Scores and logits of the base with the same head, of the strategy, and of the LoRA."""
        backbone = made.backbone
        with _placed_parts_off(made):
            base, plain = score(backbone, self.held), logits_of(backbone, self.inputs)
        after, logits = score(backbone, self.held), logits_of(backbone, self.inputs)
        positions = [kept_positions(batch, one) for batch, one in zip(self.inputs, self.logits, strict=True)]
        before, here, there = (
            torch.cat([one[kept] for one, kept in zip(group, positions, strict=True)])
            for group in (self.logits, logits, plain)
        )
        missing, effect = float((here - before).abs().mean()), float((there - before).abs().mean())
        return {
            "strategy": type(self.injection.strategy).__name__,
            "calibration": str(self.path),
            "rows": len(self.rows),
            "tokens": self.tokens,
            "scored_on": self.scored_on,
            "scored": len(self.held.rows),
            "metric": self.task.metric,
            "score": {"base": base, "strategy": self.score, "lora": after},
            "mean_logit_difference": missing,
            "mean_strategy_effect": effect,
            "logit_difference_of_effect": missing / effect if effect else 0.0,
            "same_top_prediction": float((here.argmax(-1) == before.argmax(-1)).float().mean()),
        }


def _task(source: Path, injection: Injection) -> Task:
    """The task that it was trained for, as its folder says, or as its base is."""
    backbone = injection.backbone
    settings = dict((read_settings(source) or {}).get("task") or {})
    if not settings and backbone.task is not None:
        names = backbone.model.config.id2label if backbone.head else {}
        settings = {"name": backbone.task, "labels": [names[index] for index in sorted(names)]}
    if not settings:
        raise ConfigurationError(
            f"{source} does not say which task it was trained for, so no rows of it can be read",
            expected="a classifier or a language model",
            todo="ship the adapter folder as it is",
        )
    return as_task(settings)


def _require_enough(rows: list[Row], path: Path) -> None:
    if len(rows) < BATCHES:
        raise DataError(
            f"{path} leaves {len(rows)} rows to fit a LoRA to",
            expected=f"at least {BATCHES}, better hundreds",
            todo="give a file with more rows",
        )


def _inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _fits(found: Distilled) -> Iterator[tuple[str, Fit]]:
    """Factors of about equal size; the norm of what was wanted of the stream, and how much of that is missing."""
    for name, one in found.regressions.items():
        if one.rank:
            root = torch.linalg.vector_norm(one.a, dim=1).clamp(min=1e-30).sqrt()
            wanted = found.wanted[name] ** 0.5
            share = (one.error / one.held) ** 0.5 if one.held else 0.0
            yield name, Fit((one.b * root).float(), (one.a / root[:, None]).float(), wanted, wanted * share)


@contextmanager
def _placed_parts_off(made: Injection) -> Iterator[None]:
    """Within it the model is the base with what is trained whole: the head, modules_to_save."""
    placed = [primitive for primitive in made.primitives if not isinstance(primitive, Unfreezing)]
    try:
        for primitive in placed:
            primitive.enable(False)
        yield
    finally:
        for primitive in placed:
            primitive.enable(True)
