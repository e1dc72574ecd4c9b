"""A merged checkpoint, loaded by plain transformers elsewhere, against base + adapter loaded here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightsft import artifact
from lightsft.backbone import Backbone
from lightsft.export.certificate import certify, logits_of, plain_logits
from lightsft.export.held_out import HeldOut
from lightsft.export.inputs import inputs_to_compare, score


def check_by_loading(
    folder: Path,
    adapter: Path,
    base: str | None,
    rows: HeldOut | None,
    dtype: str = "checkpoint",
    *,
    exact: bool = True,
) -> dict[str, Any]:
    """Logits of both on `rows` (random tokens without), the score before and after; `passed` by stated limits.

    What is not `exact` (codes, other weights) is measured and has no limit.
    """
    backbone = artifact.load_base(adapter, base, dtype=dtype, device="cpu")
    injection = artifact.load(adapter, backbone)
    compared = inputs_to_compare(backbone, rows)
    tuned = logits_of(backbone, compared)
    with injection.disabled():
        plain = logits_of(backbone, compared)
    name = backbone.task or "chat"
    reloaded = plain_logits(folder, name, compared)
    found = certify(
        compared,
        base=plain,
        tuned=tuned,
        merged=reloaded,
        reloaded=reloaded,
        half_precision=backbone.stored_dtype != torch.float32,
        exact=exact,
    )
    if rows is not None:
        merged = Backbone.load(folder, task=name, dtype="checkpoint", device="cpu")
        found |= {"metric": rows.task.metric, "examples": len(rows.rows)}
        found |= {"score_before": score(backbone, rows), "score_after": score(merged, rows)}
    return found
