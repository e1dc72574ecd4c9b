"""Merge a saved strategy into its base in memory, write a plain checkpoint, reload it elsewhere, certify it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lightsft import artifact
from lightsft.backbone import Backbone
from lightsft.device import choose_dtype
from lightsft.errors import ArtifactError, MergeError
from lightsft.export.certificate import certify, logits_of, plain_logits, require_passed
from lightsft.export.companions import copy_licence, keep_length
from lightsft.export.held_out import HeldOut
from lightsft.export.inputs import inputs_to_compare, score
from lightsft.export.mergeable import require_mergeable
from lightsft.export.model_card import write_card
from lightsft.export.pooling import write_pooling
from lightsft.export.provenance import CERTIFICATE, provenance
from lightsft.export.rounding import MOST_ROUNDING
from lightsft.export.storing import CORRECTION, onto_base, onto_codes, onto_original
from lightsft.files import new_folder, require_free, write_json
from lightsft.injection import Injection
from lightsft.plain_layers import computed_exactly
from lightsft.quantization import Quantization
from lightsft.quiet import quiet
from lightsft.schemes import BASE, ORIGINAL, SCHEMES


def merge_in_memory(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    rows: HeldOut | None = None,
    dtype: str = "checkpoint",
    onto: str = BASE,
    most_rounding: float = MOST_ROUNDING,
    correction_rank: int = 0,
    max_shard_size: int | None = None,
) -> dict[str, Any]:
    """Merge, verify on `rows` (on random tokens without), write; returns the certificate."""
    require_free(out)
    backbone = artifact.load_base(adapter, base, dtype=dtype, device="cpu")
    injection = artifact.load(adapter, backbone)
    require_mergeable(injection, adapter)
    name = backbone.task or "chat"
    compared = inputs_to_compare(backbone, rows)
    wanted = None if dtype == "checkpoint" else choose_dtype(dtype, backbone.model.device)
    with computed_exactly(backbone.model) if wanted == torch.float32 else nullcontext():
        tuned = logits_of(backbone, compared)
        with injection.disabled():
            plain = logits_of(backbone, compared)
    scores: dict[str, Any] = {}
    if rows is not None:
        scores = {"metric": rows.task.metric, "examples": len(rows.rows), "score_before": score(backbone, rows)}
    if onto == ORIGINAL:
        stored = onto_original(injection, lambda: _on_original(adapter, base, dtype), most_rounding)
    elif onto in SCHEMES:
        stored = onto_codes(injection, Quantization(onto), most_rounding, correction_rank, str(out))
    else:
        stored = onto_base(injection, wanted, most_rounding)
    model = stored.backbone.model
    with quiet(), new_folder(out) as folder:
        model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        if stored.correction is not None:
            stored.correction.save(folder / CORRECTION)
        keep_length(backbone.tokenizer, adapter)
        backbone.tokenizer.save_pretrained(folder)
        reloaded_logits = plain_logits(folder, name, compared)
        certificate = certify(
            compared,
            base=plain,
            tuned=tuned,
            merged=stored.logits(compared),
            reloaded=reloaded_logits,
            half_precision=model.dtype != torch.float32 or stored.backbone.quantization is not None,
            exact=stored.exact,
            in_codes=stored.backbone.quantization is not None,
        )
        if rows is not None:
            reloaded = Backbone.load(folder, task=name, dtype="checkpoint", device="cpu")
            scores["score_after"] = score(reloaded, rows)
            if stored.correction is not None:
                artifact.load(folder / CORRECTION, reloaded)
                scores["score_corrected"] = score(reloaded, rows)
        certificate |= scores | stored.report() | {"check": "load", "written": "from memory", "dtype": dtype}
        certificate |= provenance(adapter, str(backbone.source), checked=folder)
        require_passed(
            certificate, in_codes=stored.backbone.quantization is not None, wide=model.dtype == torch.float32
        )
        copy_licence(Path(str(backbone.source)), folder)
        write_json(folder / CERTIFICATE, certificate)
        write_pooling(folder, adapter)
        write_card(folder, certificate)
    return certificate


def _on_original(adapter: Path, base: str | None, dtype: str) -> Injection:
    """The same strategy on the weights that the codes were made of."""
    original = artifact.load_base(adapter, base, dtype=dtype, device="cpu", as_quantized=False)
    if original.quantization is not None:
        raise MergeError(
            f"{original.source} holds the codes themselves ({original.quantization})",
            expected="the checkpoint in floating point that they were made of",
            todo="name it with --base, or leave out --onto original",
        )
    try:
        return artifact.load(adapter, original, other_quantization=True)
    except ArtifactError as error:
        raise MergeError(
            f"what was trained beside codes does not fit the original weights: {error.found}",
            expected="a strategy that places the same on both",
            todo="merge onto the dequantized weights: --onto base",
        ) from error
