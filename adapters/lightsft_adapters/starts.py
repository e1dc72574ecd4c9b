"""What A and B start from when W, or what its codes lose, decides it: s B A (out, in) of a rank.

PiSSA (2404.02948) and OLoRA (2406.01775) take factors of W. Beside codes Q = q(W), LoftQ (2310.08659) takes what they
lose, and PiSSA's quantized form (section 4) takes the principal part of W and makes codes of the rest; both start
near W, where the codes alone are not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightsft.codes import Codes
from lightsft.errors import ConfigurationError
from lightsft.quantization import dequantized


def principal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA: W = U S V^T; B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T over the `rank` largest singular values."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = torch.sqrt(s[..., :rank] / scaling)
    return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


def orthogonal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """OLoRA: W = Q R; B0 = Q[:, :rank], A0 = R[:rank]."""
    q, r = torch.linalg.qr(weight)
    return q[..., :rank], r[..., :rank, :]


@torch.no_grad()
def loftq(
    layer: nn.Module, exact: Tensor, rank: int, scaling: float, steps: int
) -> tuple[Tensor, Tensor, Codes | None]:
    """B, A and the codes beside them (None: the layer's own), algorithm 1; `exact` is W (out, in).

    Each step after the first makes codes of W - s B A. s B A is the nearest to what the codes lose.
    """
    codes = None
    b, a = principal(exact - dequantized(layer).cpu(), rank, scaling)
    for _ in range(steps - 1):
        codes = Codes.made_of(exact - scaling * (b @ a), layer)
        b, a = principal(exact - codes.weight().cpu(), rank, scaling)
    return b, a, codes


@torch.no_grad()
def qpissa(layer: nn.Module, exact: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor, Codes]:
    """B, A of the principal part of W, and codes of W - s B A."""
    b, a = principal(exact, rank, scaling)
    return b, a, Codes.made_of(exact - scaling * (b @ a), layer)


def check_rank(fits: bool, rank: int, initialisation: str, weight: Tensor) -> None:
    """Raise ConfigurationError where a matrix has fewer singular values than the rank asked for."""
    if not fits:
        raise ConfigurationError(
            f"rank={rank} on a weight of shape {tuple(weight.shape)} with {initialisation}",
            expected=f"a rank of at most {min(weight.shape)}",
        )
