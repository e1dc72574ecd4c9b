"""Merge a saved strategy into its base, write a plain transformers checkpoint, reload it elsewhere, certify it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lightsft import adapter_files, artifact
from lightsft.backbone import Backbone
from lightsft.device import choose_dtype
from lightsft.dry_run import text_config
from lightsft.errors import ArtifactError, ConfigurationError, MergeError
from lightsft.export.certificate import CERTIFICATE, Batch, certify, logits_of, plain_logits, provenance
from lightsft.export.held_out import HeldOut, held_out
from lightsft.export.rounding import MOST_ROUNDING
from lightsft.export.storing import BASE, CORRECTION, ORIGINAL, Stored, onto_base, onto_codes, onto_original
from lightsft.files import new_folder, require_free, write_json
from lightsft.injection import Injection
from lightsft.plain_layers import computed_exactly
from lightsft.quantization import SCHEMES, Quantization
from lightsft.quiet import quiet
from lightsft.training.evaluate import batches, score_model

RANDOM_INPUTS, RANDOM_TOKENS = 32, 24
MOST_LOGITS = 2**26  # numbers kept for the comparison, 256 MiB in fp32


def merge(
    adapter_dir: str | Path,
    *,
    base: str | Path | None = None,
    out: str | Path,
    dtype: str = "checkpoint",
    onto: str = BASE,
    most_rounding: float = MOST_ROUNDING,
    correction_rank: int = 0,
    data: str | Path | None = None,
    encoding: str = "utf-8",
) -> Path:
    """Write the merged checkpoint to `out` with its certificate.json; returns `out`.

    `base` defaults to where the strategy was trained from. The checkpoint keeps the base's own type unless `dtype`
    names another: fp32 arithmetic and one rounding. For a strategy that was trained beside codes, `onto` chooses what
    it is added to: "base" (the dequantized weights, which is what was trained), "original" (the weights that the codes
    were made of), or codes again: "int8", "nf4", "fp4". With those, `correction_rank` fits a LoRA to what the codes
    lose and writes it to `out`/correction. The certificate holds the score before and after on rows of `data` (in
    `encoding`); without it, on the test split of the run that `adapter_dir` is of, where its data is still there.
    Raises MergeError if the strategy does not merge, if storing the weights loses more than `most_rounding` of what was
    trained, or if the reloaded checkpoint differs from base + adapter; OutputError if `out` holds something. Only what
    passed is left there.
    """
    rows = held_out(Path(adapter_dir), None if data is None else str(data), encoding)
    merge_folder(
        Path(adapter_dir),
        Path(out),
        base=None if base is None else str(base),
        rows=rows,
        dtype=dtype,
        onto=onto,
        most_rounding=most_rounding,
        correction_rank=correction_rank,
    )
    return Path(out)


def merge_folder(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    rows: HeldOut | None = None,
    dtype: str = "checkpoint",
    onto: str = BASE,
    most_rounding: float = MOST_ROUNDING,
    correction_rank: int = 0,
) -> dict[str, Any]:
    """Merge, verify on `rows` (on random tokens without), write; returns the certificate."""
    require_free(out)
    _require_known(onto, dtype, correction_rank)
    backbone = artifact.load_base(adapter, base, dtype=dtype, device="cpu")
    injection = artifact.load(adapter, backbone)
    if not injection.mergeable:
        raise _cannot_merge(injection, adapter)
    name = backbone.task or "chat"
    compared = _inputs(backbone, rows)
    wanted = None if dtype == "checkpoint" else choose_dtype(dtype, backbone.model.device)
    with computed_exactly(backbone.model) if wanted == torch.float32 else nullcontext():
        tuned = logits_of(backbone, compared)
        with injection.disabled():
            plain = logits_of(backbone, compared)
    scores: dict[str, Any] = {}
    if rows is not None:
        scores = {"metric": rows.task.metric, "examples": len(rows.rows), "score_before": _score(backbone, rows)}
    if onto == ORIGINAL:
        stored = onto_original(injection, lambda: _on_original(adapter, base, dtype), most_rounding)
    elif onto in SCHEMES:
        stored = onto_codes(injection, Quantization(onto), most_rounding, correction_rank, str(out))
    else:
        stored = onto_base(injection, wanted, most_rounding)
    model = stored.backbone.model
    with quiet(), new_folder(out) as folder:
        model.save_pretrained(folder)
        if stored.correction is not None:
            stored.correction.save(folder / CORRECTION)
        _keep_length(backbone, adapter)
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
            scores["score_after"] = _score(reloaded, rows)
            if stored.correction is not None:
                artifact.load(folder / CORRECTION, reloaded)
                scores["score_corrected"] = _score(reloaded, rows)
        certificate |= scores | stored.report() | provenance(adapter, str(backbone.source), folder)
        if not certificate["passed"]:
            raise _not_the_same(certificate, stored)
        write_json(folder / CERTIFICATE, certificate)
    return certificate


def _score(backbone: Backbone, rows: HeldOut) -> float:
    return float(score_model(backbone, rows.task, rows.rows, 64)[rows.task.metric])


def _require_known(onto: str, dtype: str, correction_rank: int) -> None:
    if onto not in (BASE, ORIGINAL, *SCHEMES):
        raise ConfigurationError(f"onto={onto!r}", expected=f"one of {', '.join((BASE, ORIGINAL, *SCHEMES))}")
    if correction_rank and onto not in SCHEMES:
        raise ConfigurationError(
            f"a correction of rank {correction_rank} onto {onto}",
            expected=f"codes, which lose something: {', '.join(SCHEMES)}",
            todo="leave --correction-rank out",
        )
    if dtype != "checkpoint" and onto in SCHEMES:
        raise ConfigurationError(
            f"dtype={dtype!r} onto {onto}",
            expected="the type that the base is kept in, for what is not in codes",
            todo="leave --dtype out",
        )


def _not_the_same(certificate: Mapping[str, Any], stored: Stored) -> MergeError:
    """What was compared and differs: the reload with what was written, or that with base + adapter."""
    todo = "nothing was written; merge in full precision with --dtype float32"
    if stored.backbone.quantization is not None:
        todo = "nothing was written; keep what was trained in plain weights (--onto base)"
    elif stored.backbone.model.dtype == torch.float32:
        todo = "nothing was written; report it with the model's name"
    if certificate["reload_difference"] > certificate["reload_limit"]:
        return MergeError(
            f"the merged checkpoint, reloaded by plain transformers, differs from what was merged by "
            f"{certificate['reload_difference']:.3g}",
            expected=f"a {certificate['reload_limit_applies_to']} of at most {certificate['reload_limit']:.3g}",
            todo=todo,
        )
    return MergeError(
        f"the merged checkpoint differs from base + adapter by {certificate['largest_logit_difference']:.3g}",
        expected=f"a {certificate['limit_applies_to']} of at most {certificate['limit']:.3g}",
        todo=todo,
    )


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


def _keep_length(backbone: Backbone, adapter: Path) -> None:
    """A classifier's checkpoint cuts texts where its training did: the length travels with the tokenizer."""
    settings = (adapter_files.read_settings(adapter) or {}).get("task") or {}
    if settings.get("max_length") and backbone.head:
        backbone.tokenizer.model_max_length = min(backbone.tokenizer.model_max_length, settings["max_length"])


def _cannot_merge(injection: Injection, adapter: Path) -> MergeError:
    return MergeError(
        f"{adapter} holds {type(injection.strategy).__name__}, which computes something that no weight can express",
        expected="a strategy that changes weights (full, lora)",
        todo=f"ship the adapter folder itself: lightsft.load({str(adapter)!r}), or lightsft predict {adapter} TEXT",
    )


def _inputs(backbone: Backbone, rows: HeldOut | None) -> list[Batch]:
    """Batches to compare on: as many rows as the logits fit in MOST_LOGITS, or random tokens."""
    found: list[Batch] = []
    if rows is None:
        found = _random_inputs(backbone)
    else:
        found = [_without_labels(batch) for batch in batches(rows.task, rows.rows, backbone.tokenizer, 16)]
    width = 1 if backbone.head else int(text_config(backbone.model).vocab_size)
    kept: list[Batch] = []
    numbers = 0
    for batch in found:
        numbers += batch["input_ids"].numel() * width
        if kept and numbers > MOST_LOGITS:
            break
        kept.append(batch)
    return kept


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _random_inputs(backbone: Backbone) -> list[Batch]:
    vocabulary = int(text_config(backbone.model).vocab_size)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (RANDOM_INPUTS, RANDOM_TOKENS), generator=random)
    end = getattr(backbone.model.config, "eos_token_id", None)
    if isinstance(end, int) and end < vocabulary:  # some classifiers read the state at the one end token of a row
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
