"""k examples per class, drawn by hash: the same draw on any machine, whatever the order of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lightsft.data.parts import Row
from lightsft.data.splits import position
from lightsft.errors import DataError

Classes = Callable[[Row], Sequence[str]]


def few_shot(rows: Sequence[Row], k: int, classes: Classes, draw: int, key: Callable[[Row], str]) -> list[Row]:
    """Rows in the order of SHA-256("few-shot {draw}:" + key), of each text one.

    Rows with one class each: exactly k of every class. Rows with several (labels, entity types; a type that occurs
    twice in a sentence counts twice): greedy sampling to N-way K~2K-shot (Ding et al. 2021, 2105.07464, Algorithm 1): a
    row is taken if one of its classes has fewer than k and none would have more than 2k. Where that leaves a class
    short, rows that overshoot 2k least are added, so that every class has at least k in any case. Rows without a class
    are not taken.

    Raises DataError naming the classes that occur fewer than k times.
    """
    order = _drawn(rows, classes, draw, key)
    counted = [Counter(classes(row)) for row in order]
    available = sum(counted, Counter[str]())
    _require_enough(available, k)
    taken, total = _greedy(counted, k), Counter[str]()
    for index in taken:
        total += counted[index]
    chosen = set(taken)
    while short := {name for name in available if total[name] < k}:
        candidates = [index for index in range(len(order)) if index not in chosen and short & counted[index].keys()]
        best = min(candidates, key=lambda index: (_over(total + counted[index], k), index))
        chosen.add(best)
        total += counted[best]
    return [order[index] for index in sorted(chosen)]


def _drawn(rows: Sequence[Row], classes: Classes, draw: int, key: Callable[[Row], str]) -> list[Row]:
    """One row per text, in the order of this draw. Of rows with the same text the one with the first classes stays."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        same.setdefault(key(row), []).append(row)
    texts = sorted(same, key=lambda text: (position(f"few-shot {draw}:{text}"), text))
    return [
        min(same[text], key=lambda row: (sorted(classes(row)), repr(sorted(row.items(), key=str))))
        if len(same[text]) > 1
        else same[text][0]
        for text in texts
    ]


def _greedy(counted: Sequence[Counter[str]], k: int) -> list[int]:
    """Indices of rows that bring a class closer to k and none above 2k, in their order."""
    total: Counter[str] = Counter()
    taken = []
    for index, counts in enumerate(counted):
        if any(total[name] < k for name in counts) and not _over(total + counts, k):
            total += counts
            taken.append(index)
    return taken


def _over(total: Mapping[str, int], k: int) -> int:
    """By how much classes exceed 2k, in all."""
    return sum(max(0, count - 2 * k) for count in total.values())


def _require_enough(available: Mapping[str, int], k: int) -> None:
    if k < 1 or not available:
        raise DataError(f"{k} examples of {len(available)} classes", expected="at least one of each")
    few = sorted(name for name, count in available.items() if count < k)
    if few:
        raise DataError(
            f"fewer than {k} different examples of {', '.join(f'{name!r} ({available[name]})' for name in few)}",
            expected=f"at least {k} of every class",
            todo="draw fewer examples per class, add rows, or leave these classes out",
        )
