"""A GGUF file, read back with transformers, against the model that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lightsft.backbone import Backbone
from lightsft.errors import BackboneError, ConfigurationError, MergeError
from lightsft.export.certificate import Batch, logits_of

LIMITS = {"f32": 1e-3, "f16": 2e-2, "bf16": 5e-2, "q8_0": 0.2}  # of the largest logit, or of the adapter's effect
TEXTS = ("Hello  world, don't!", "1234,5 \n\n\tçà et là 日本 🙂")
NOISE = 1e-4  # of the largest logit: fp32 arithmetic in another order, W + B A for W x + B (A x)


def read_back(file: Path, batches: Sequence[Batch], by_hand: str) -> tuple[list[Tensor], Any]:
    """The logits of a GGUF file, its weights taken as the fp32 values that they stand for; its tokenizer, if
    transformers can make one of it."""
    try:
        kind = transformers.AutoModelForCausalLM
        backbone = Backbone.load(file, task="chat", kind=kind, dtype="float32", device="cpu")
    except BackboneError as error:
        raise ConfigurationError(
            f"transformers cannot read what was converted, so it cannot be checked: {error.found.partition(': ')[2]}",
            expected="an architecture whose GGUF files transformers reads",
            todo=f"nothing was written; without a check, in a checkout of llama.cpp: {by_hand}",
        ) from error
    return logits_of(backbone, batches), backbone.tokenizer


def same_tokens(tokenizer: Any, read: Any) -> bool | None:
    """Whether transformers splits a few texts in the same way by the file's tokenizer; None if it has made none of it.

    Reported and no more: transformers follows fewer of a GGUF file's rules for splitting than llama.cpp.
    """
    if tokenizer is None or read is None:
        return None
    return all(tokenizer(text)["input_ids"] == read(text)["input_ids"] for text in TEXTS)


def compared(expected: Sequence[Tensor], found: Sequence[Tensor], kind: str) -> dict[str, Any]:
    """How far apart the logits are, and how far they may be."""
    before, after = torch.cat(list(expected)), torch.cat(list(found))
    if before.shape != after.shape:
        raise MergeError(
            f"the GGUF file has a vocabulary of {after.shape[-1]}", expected=f"{before.shape[-1]}, as the model has"
        )
    largest, difference = float(before.abs().max()), (after - before).abs()
    return {
        "inputs": sum(len(part) for part in expected),
        "positions": before[..., 0].numel(),
        "largest_value": largest,
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "same_top_prediction": float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        "limit": LIMITS[kind] * largest,
        "limit_applies_to": f"largest difference: {LIMITS[kind]:g} of the largest logit, for {kind}",
    }


def compared_lora(
    plain: Sequence[Tensor], expected: Sequence[Tensor], found: Sequence[Tensor], kind: str
) -> dict[str, Any]:
    """The same with a limit in units of what the adapter does to the logits of the plain model."""
    effect = float((torch.cat(list(expected)) - torch.cat(list(plain))).abs().max())
    described = compared(expected, found, kind)
    return described | {
        "largest_adapter_effect": effect,
        "limit": LIMITS[kind] * effect + NOISE * described["largest_value"],
        "limit_applies_to": f"largest difference: {LIMITS[kind]:g} of the adapter's largest effect, for {kind}, and "
        f"{NOISE:g} of the largest logit",
    }


def require_close(found: dict[str, Any], todo: str) -> None:
    """Raise MergeError where it is farther; NaN is."""
    if not found["largest_difference"] <= found["limit"]:
        raise MergeError(
            f"read back by transformers, the GGUF file differs by {found['largest_difference']:.3g} at logits of up to "
            f"{found['largest_value']:.3g}",
            expected=f"at most {found['limit']:.3g} ({found['limit_applies_to']})",
            todo=f"nothing was written; {todo}",
        )


def add_lora(weights: Path, lora: Path) -> int:
    """W <- W + (alpha / rank) B A in a GGUF file in fp32, which is what llama.cpp computes; how many matrices."""
    from gguf import GGUFReader, dequantize

    adapter, base = GGUFReader(lora), GGUFReader(weights, "r+")
    alpha = float(adapter.fields["adapter.lora.alpha"].contents())
    parts = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in adapter.tensors}
    held = {tensor.name: tensor.data for tensor in base.tensors}
    names = sorted(name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a"))
    beyond = [
        name
        for name in {part.removesuffix(".lora_a").removesuffix(".lora_b") for part in parts}
        if name not in held or name not in names or name.startswith("token_embd")
    ]
    if beyond:
        raise ConfigurationError(
            f"the adapter holds {', '.join(sorted(beyond))}, which cannot be checked as a GGUF LoRA",
            expected="B A beside linear layers",
            todo="leave --lora out: it is merged first",
        )
    for name in names:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]  # (rank, in), (out, rank)
        held[name][...] += alpha / len(a) * (b @ a)
    base.data.flush()
    return len(names)
