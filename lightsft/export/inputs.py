"""What two models are compared on: rows that were held out, or random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightsft.backbone import Backbone
from lightsft.dry_run import text_config
from lightsft.export.certificate import Batch
from lightsft.export.held_out import HeldOut
from lightsft.training.evaluate import batches, score_model

RANDOM_INPUTS, RANDOM_TOKENS = 32, 24
MOST_LOGITS = 2**26  # numbers kept for the comparison, 256 MiB in fp32


def score(backbone: Backbone, rows: HeldOut) -> float:
    """The task's metric of the backbone as it is now."""
    return float(score_model(backbone, rows.task, rows.rows, 64)[rows.task.metric])


def inputs_to_compare(backbone: Backbone, rows: HeldOut | None) -> list[Batch]:
    """Batches to compare on: as many rows as the logits fit in MOST_LOGITS, or random tokens."""
    found: list[Batch] = []
    if rows is None:
        found = _random_inputs(backbone)
    else:
        made = batches(rows.task, rows.rows, backbone.tokenizer, 16)
        found = [rows.task.model_inputs(_without_labels(batch), batch["labels"], backbone.model) for batch in made]
    width = 1 if backbone.head else int(text_config(backbone.model).vocab_size)
    kept: list[Batch] = []
    numbers = 0
    for batch in found:
        numbers += next(iter(batch.values())).numel() * width
        if kept and numbers > MOST_LOGITS:
            break
        kept.append(batch)
    return kept


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _random_inputs(backbone: Backbone) -> list[Batch]:
    """Random tokens, or whatever else the model reads, in the shapes of its example."""
    example = backbone.example or {}
    ids = example.get("input_ids")
    if ids is None or ids.dim() != 2 or any(name.startswith("decoder") for name in example):
        return [_like(example, seed) for seed in range(RANDOM_INPUTS)]
    vocabulary = int(text_config(backbone.model).vocab_size)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (RANDOM_INPUTS, RANDOM_TOKENS), generator=random)
    end = getattr(backbone.model.config, "eos_token_id", None)
    if isinstance(end, int) and end < vocabulary:  # some classifiers read the state at the one end token of a row
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]


def _like(example: Mapping[str, Any], seed: int) -> Batch:
    """Other tokens, other pixels or samples; masks and the like as they are."""
    random = torch.Generator().manual_seed(seed)
    made: Batch = {}
    for name, value in example.items():
        if not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            made[name] = torch.randn(value.shape, generator=random).to(value)
        elif name.endswith("input_ids"):
            order = torch.randperm(value.numel(), generator=random).to(value.device)
            made[name] = (value.flatten()[order].reshape(value.shape) + seed) % (int(value.max()) + 1)
        else:
            made[name] = value.clone()
    return made
