"""Merged weights stored in codes again, and the small LoRA that makes up for what the codes lose.

    W' ~ Q + B A,  Q = dequantized codes (out, in), B (out, rank), A (rank, in)

One step takes Q = quantized(W') and the best B A of its error, by singular values. More steps alternate (2310.08659):
Q = quantized(W' - B A), then B A of what that loses. The best of all steps is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.export.rounding import Rounding
from lightsft.quantization import Quantization, dequantized, matrix
from lightsft.quantizing import mark_quantized, quantized_layer


@dataclass(frozen=True)
class Correction:
    """The factors for one layer."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)


@torch.no_grad()
def requantize(
    model: PreTrainedModel,
    deltas: Mapping[str, float],
    how: Quantization,
    compute_dtype: torch.dtype,
    *,
    rank: int = 0,
    steps: int = 5,
) -> tuple[list[Rounding], list[Rounding], dict[str, Correction]]:
    """Store the layers of a merged model in codes, in place: what each loses, would lose without its correction, and
    the corrections.

    `deltas` holds the norm of what was trained for every layer to quantize, 0 for one that training left alone.
    """
    rows, without, corrections = [], [], {}
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        exact = matrix(layer).float()
        made, correction = _fitted(layer, exact, how, compute_dtype, rank, steps)
        error = dequantized(made) - exact
        if correction is not None:
            corrections[name] = correction
            error += correction.b @ correction.a
            without.append(_rounding(name, delta, dequantized(quantized_layer(layer, how, compute_dtype)) - exact))
        rows.append(_rounding(name, delta, error))
        model.set_submodule(name, made)
    mark_quantized(model, how, compute_dtype)
    return rows, without, corrections


def _rounding(name: str, delta: float, error: Tensor) -> Rounding:
    return Rounding(f"{name}.weight", delta, float(torch.linalg.vector_norm(error)))


def _fitted(
    layer: nn.Module, exact: Tensor, how: Quantization, compute_dtype: torch.dtype, rank: int, steps: int
) -> tuple[nn.Module, Correction | None]:
    made = quantized_layer(layer, how, compute_dtype)
    if rank == 0:
        return made, None
    best: tuple[float, nn.Module, Correction] | None = None
    for _ in range(steps):
        correction = _low_rank(exact - dequantized(made), rank)
        product = correction.b @ correction.a
        error = float(torch.linalg.vector_norm(exact - dequantized(made) - product))
        if best is None or error < best[0]:
            best = error, made, correction
        made = quantized_layer(layer, how, compute_dtype, weight=exact - product)
    assert best is not None
    return best[1], best[2]


def _low_rank(error: Tensor, rank: int) -> Correction:
    """The nearest matrix of this rank, its singular values shared evenly."""
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    root = torch.sqrt(s[:rank])
    return Correction(a=root[:, None] * vt[:rank], b=u[:, :rank] * root)
