"""The certificate of a merged checkpoint: what was compared with what, on how much, and how far apart they are."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightsft.backbone import PROCESSORS, Backbone, auto_class
from lightsft.dry_run import evaluating
from lightsft.errors import MergeError
from lightsft.export.plain_logits import main_output

Batch = dict[str, Tensor]
FULL_PRECISION_LIMIT = 1e-4  # of the largest logit: fp32 arithmetic in another order
HALF_PRECISION_LIMIT = 0.25  # of the strategy's own mean effect: one rounding of the merged weights to 16 bit
HALF_PRECISION_RELOAD = 1e-2  # of the largest logit: the same weights in another process
CODES_RELOAD = 5e-2  # of the largest logit, in the mean: bitsandbytes evaluates codes with other roundings


def logits_of(backbone: Backbone, batches: Sequence[Batch], device: torch.device | None = None) -> list[Tensor]:
    """The logits of each batch in fp32, without dropout; on `device`, by default the model's own."""
    place = device or backbone.model.device
    with torch.no_grad(), evaluating(backbone.model):
        inputs = ({name: value.to(place) for name, value in batch.items()} for batch in batches)
        return [main_output(backbone.model(**batch)).cpu() for batch in inputs]


def plain_logits(checkpoint: Path, task: str, batches: Sequence[Batch], *, from_disk: bool = False) -> list[Tensor]:
    """The same from a checkpoint folder, by transformers alone in a process where lightsft cannot be imported.

    `from_disk`: a layer at a time.
    """
    loads = auto_class(task, str(checkpoint)).__name__
    with tempfile.TemporaryDirectory() as scratch:
        stored, written = Path(scratch) / "batches.safetensors", Path(scratch) / "logits.safetensors"
        save_file({f"{i}.{name}": t.contiguous() for i, b in enumerate(batches) for name, t in b.items()}, stored)
        script = Path(__file__).with_name("plain_logits.py")
        command = [
            sys.executable,
            str(script),
            str(checkpoint),
            loads,
            PROCESSORS.get(task, "AutoTokenizer"),
            str(stored),
            str(written),
            *([str(Path(scratch) / "offload")] if from_disk else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MergeError(
                f"the merged checkpoint does not load with plain transformers: {done.stderr.strip()[-800:]}",
                expected=f"{loads}.from_pretrained to succeed",
                todo="report it with the model's name; the adapter folder is unharmed",
            )
        found = load_file(written)
        return [found[str(number)] for number in range(len(batches))]


def certify(
    batches: Sequence[Batch],
    *,
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    merged: Sequence[Tensor],
    reloaded: Sequence[Tensor],
    half_precision: bool,
    exact: bool = True,
    in_codes: bool = False,
) -> dict[str, Any]:
    """Compare logits of base, base + adapter, the merge in memory and its reload, where the mask keeps them.

    What is not meant to be exact (codes, other weights) has to be reloaded as it was written; how far it is from what
    was trained is reported, and limited by the rounding of its weights.
    """
    kept = [kept_positions(batch, logits) for batch, logits in zip(batches, tuned, strict=True)]
    before, here, after, plain = (
        torch.cat([logits[keep] for logits, keep in zip(group, kept, strict=True)])
        for group in (tuned, merged, reloaded, base)
    )
    largest = max(1.0, float(before.abs().max()))
    moved = (after - here).abs()
    reload_difference = float(moved.mean() if in_codes else moved.max())
    precision = CODES_RELOAD if in_codes else HALF_PRECISION_RELOAD if half_precision else FULL_PRECISION_LIMIT
    reload_limit = largest * precision
    difference = (after - before).abs()
    shared = min(before.shape[-1], plain.shape[-1])  # the base has no logits of new tokens
    effect = (before[..., :shared] - plain[..., :shared]).abs()
    if half_precision:
        measured, limit = float(difference.mean()), HALF_PRECISION_LIMIT * float(effect.mean())
    else:
        measured, limit = float(difference.max()), FULL_PRECISION_LIMIT * largest
    return {
        "passed": (measured <= limit or not exact) and reload_difference <= reload_limit,
        "limit": limit,
        "limit_applies_to": "mean logit difference" if half_precision else "largest logit difference",
        "inputs": sum(len(next(iter(batch.values()))) for batch in batches),
        "positions": int(before.shape[0]),
        "largest_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        "reload_difference": reload_difference,
        "reload_limit": reload_limit,
        "reload_limit_applies_to": "mean logit difference" if in_codes else "largest logit difference",
        "largest_adapter_effect": float(effect.max()),
        "mean_adapter_effect": float(effect.mean()),
        "compared": "base + adapter in memory with the merged checkpoint, reloaded from disk by transformers in a "
        "process where lightsft cannot be imported",
        "same_top_prediction": float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    }


def require_passed(certificate: Mapping[str, Any], *, wide: bool, in_codes: bool = False) -> None:
    """Raise MergeError with what differs: the reload from what was written, or that from base + adapter."""
    if certificate["passed"]:
        return
    todo = "nothing was written; merge in full precision with --dtype float32"
    if in_codes:
        todo = "nothing was written; keep what was trained in plain weights (--onto base)"
    elif wide:
        todo = "nothing was written; report it with the model's name"
    if certificate["reload_difference"] > certificate["reload_limit"]:
        raise MergeError(
            f"the merged checkpoint, reloaded by plain transformers, differs from what was merged by "
            f"{certificate['reload_difference']:.3g}",
            expected=f"a {certificate['reload_limit_applies_to']} of at most {certificate['reload_limit']:.3g}",
            todo=todo,
        )
    raise MergeError(
        f"the merged checkpoint differs from base + adapter by {certificate['largest_logit_difference']:.3g}",
        expected=f"a {certificate['limit_applies_to']} of at most {certificate['limit']:.3g}",
        todo=todo,
    )


def kept_positions(batch: Batch, logits: Tensor) -> Tensor:
    """Which positions count: the unpadded ones of a model with an output for each token, all of any other."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:-1] or "decoder_input_ids" in batch:
        return torch.ones(logits.shape[:-1], dtype=torch.bool)
    return mask.bool()
