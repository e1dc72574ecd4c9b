"""A few values of a weight, to tell one model from another whatever type it is loaded in."""

from __future__ import annotations

import torch
from torch import Tensor

SKETCH_VALUES = 8


def sketched(count: int) -> range:
    """The positions that are kept of so many values: SKETCH_VALUES of them, spread evenly."""
    step = max(1, count // SKETCH_VALUES)
    return range(0, count, step)[:SKETCH_VALUES]


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to 16-bit precision: either may have been loaded in half precision."""
    return one.shape == other.shape and torch.allclose(one.float().cpu(), other.float().cpu(), rtol=2**-6, atol=1e-4)
