"""The score within each value of a column: languages, sources, lengths, whatever the rows are marked with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightsft.tasks.base import Array, Task

FEWEST = 10  # rows of a group of its own
MOST = 20  # groups
FEW, REST, EMPTY = f"other (<{FEWEST})", "other", "(empty)"


def by_group(task: Task, outcomes: Array, values: Sequence[Any], metric: str) -> dict[str, dict[str, Any]]:
    """{value: {"count": rows, metric: score}}, the largest group first; a score that a group does not define is None.

    Groups of fewer than FEWEST rows are joined, as are the smallest of more than MOST.
    """
    names = grouped(values)
    found = {}
    for name, count in Counter(names).most_common():
        score = task.score(outcomes[np.array([other == name for other in names])], metric)
        found[name] = {"count": count, metric: score if math.isfinite(score) else None}
    return found


def grouped(values: Sequence[Any]) -> list[str]:
    """The group of each row."""
    names = [EMPTY if value is None or not str(value).strip() else str(value).strip() for value in values]
    counts = Counter(names)
    large = [name for name in sorted(counts, key=lambda name: (-counts[name], name)) if counts[name] >= FEWEST]
    own = set(large if len(large) + (len(large) < len(counts)) <= MOST else large[: MOST - 1])
    others = REST if len(own) < len(large) else FEW
    return [name if name in own else others for name in names]
