"""What a merge is stored as: plain weights, the original ones plus the delta, or codes again; and what that loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightsft import registry
from lightsft.backbone import Backbone
from lightsft.errors import ConfigurationError, MergeError
from lightsft.export.certificate import Batch, logits_of
from lightsft.export.requantizing import Correction, requantize
from lightsft.export.rounding import Rounding, changes, in_type, require_little, rounding, roundings, total
from lightsft.injection import Injection
from lightsft.quantization import Quantization, matrix, quantized_layers
from lightsft.quantizing import quantizable
from lightsft.schemes import BASE, ORIGINAL

CORRECTION = "correction"


@dataclass(frozen=True)
class Stored:
    """A merged model, and what storing it lost. `exact`: up to one rounding, it is what was trained."""

    backbone: Backbone
    onto: str
    roundings: Sequence[Rounding]
    exact: bool = True
    correction: Injection | None = None
    uncorrected: Rounding | None = None

    def report(self) -> dict[str, Any]:
        """For the certificate: per layer and in total."""
        found: dict[str, Any] = {
            "onto": self.onto,
            "rounding": total(self.roundings).as_json(),
            "rounding_by_weight": [row.as_json() for row in self.roundings],
        }
        if self.uncorrected is not None:
            found["rounding_without_correction"] = self.uncorrected.as_json()
        return found

    def logits(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Of the checkpoint as it is written, without its correction."""
        if self.correction is None:
            return logits_of(self.backbone, batches)
        with self.correction.disabled():
            return logits_of(self.backbone, batches)


def onto_base(injection: Injection, dtype: torch.dtype | None, most: float) -> Stored:
    """W + delta with the very W that it was trained beside, rounded once."""
    backbone = injection.backbone
    target = dtype or backbone.stored_dtype
    rows = roundings(injection, in_type(target))
    require_little(rows, most, "nothing was written; merge in full precision: --dtype float32")
    injection.merge(dtype)
    return Stored(_of(injection), BASE, rows)


def onto_original(injection: Injection, on_original: Callable[[], Injection], most: float) -> Stored:
    """W0 + delta with the weights W0 that the codes were made of: what the training made up for is added to it."""
    if injection.backbone.quantization is None:
        raise MergeError(
            "the strategy was trained on these very weights, not on codes made of them",
            expected="a strategy that was trained on a quantized base",
            todo="leave out --onto original",
        )
    original = on_original()
    store = in_type(original.backbone.stored_dtype)
    pairs = zip(changes(injection), changes(original), strict=True)
    rows = [rounding(trained, store(other)) for trained, other in pairs]
    require_little(
        rows,
        most,
        "it was trained to make up for the errors of the codes, which the original weights do not have: merge onto the "
        "dequantized weights (--onto base), or try it all the same with --most-rounding inf and compare the scores",
    )
    original.merge()
    return Stored(_of(original), ORIGINAL, rows, exact=False)


def onto_codes(injection: Injection, how: Quantization, most: float, rank: int, source: str) -> Stored:
    """W + delta in codes again, with a LoRA of this rank (0: none) for what they lose; it will be at `source`."""
    backbone = injection.backbone
    names, dtype, compute = _to_store(injection), backbone.stored_dtype, backbone.compute_dtype
    _require_rank(backbone, names, rank)
    in_codes = {f"{name}.weight" for name in names}
    trained = {row.name: row.delta for row in roundings(injection, lambda change: change.after)}
    others = [rounding(change, in_type(dtype)(change)) for change in changes(injection) if change.name not in in_codes]
    injection.merge(torch.float32)
    wanted = {name: trained.get(f"{name}.weight", 0.0) for name in names}
    rows, without, corrections = requantize(backbone.model, wanted, how, compute, rank=rank)
    rows, without = rows + others, without + others
    require_little(
        rows,
        most,
        "nothing was written; keep what was trained in plain weights (--onto base), or beside the codes with "
        f"--correction-rank {max(16, 2 * rank)}",
    )
    backbone.cast(dtype)
    stored = Backbone(
        backbone.model, tokenizer=backbone.tokenizer, task=backbone.task, source=source, compute_dtype=compute
    )
    if rank == 0:
        return Stored(stored, str(how), rows, exact=False)
    correction = _corrected(stored, corrections, rank)
    return Stored(stored, str(how), rows, exact=False, correction=correction, uncorrected=total(without))


def _to_store(injection: Injection) -> list[str]:
    """The layers to store in codes: those that are, with nothing of it in place, else those that could be."""
    backbone = injection.backbone
    with injection.disabled():
        return list(quantized_layers(backbone.model)) or quantizable(backbone.model, backbone.anatomy)


def _require_rank(backbone: Backbone, names: Sequence[str], rank: int) -> None:
    most = min((min(matrix(backbone.module(name)).shape) for name in names), default=0) if rank else rank
    if rank > most:
        raise ConfigurationError(
            f"a correction of rank {rank}", expected=f"at most {most}, the width of the narrowest layer"
        )


def _of(injection: Injection) -> Backbone:
    """The backbone of a merged injection, with nothing remembered of its codes."""
    old = injection.backbone
    return Backbone(old.model, tokenizer=old.tokenizer, task=old.task, source=old.source)


def _corrected(backbone: Backbone, corrections: dict[str, Correction], rank: int) -> Injection:
    """The factors as a LoRA on the quantized model."""
    strategy = registry.strategy("lora", rank=rank, alpha=float(rank), targets=list(corrections))
    injection = strategy.inject(backbone)
    tensors = injection.tensors()
    for name, correction in corrections.items():
        tensors[f"{name}.lora_A.weight"] = correction.a
        tensors[f"{name}.lora_B.weight"] = correction.b
    injection.load_tensors(tensors)
    return injection
