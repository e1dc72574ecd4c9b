"""Whether all numbers of a tensor are finite, found a piece at a time: torch makes copies of what it looks at."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**20


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; integers are."""
    if not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(PIECE))
