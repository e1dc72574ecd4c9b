"""Holm's correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: the i-th smallest of m times m - i + 1, none below the one before it, none above 1.

    Calling what is at most alpha a finding errs anywhere among the m tests with a probability of at most alpha,
    whatever the dependence between them (Holm, 1979).
    """
    values, order = np.asarray(p, dtype=float), np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1, stepped)
    return [float(value) for value in adjusted]
