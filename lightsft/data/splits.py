"""Train, validation and test by hash of the text: the same text always lands in the same split, on any machine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightsft.data.parts import Row
from lightsft.errors import DataError

How = Literal["hash", "stratified"]


@dataclass(frozen=True)
class Splits:
    """Disjoint rows; no text is in two of them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def named(self) -> dict[str, list[Row]]:
        """The three by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def position(text: str) -> float:
    """Where a text lies in [0, 1): the first 8 bytes of its SHA-256 as a fraction."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64


def split_rows(
    rows: Sequence[Row],
    key: Callable[[Row], str],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    how: How = "hash",
    group: str | None = None,
    classes: Callable[[Row], str | None] | None = None,
) -> Splits:
    """Rows by split, in their order. A share of 0 leaves that split empty.

    What moves as one is a unit: all rows of one text (`key`), or with `group` all rows with one value in that column
    (a row without a value is decided by its text; a text that is in two groups may be in two splits).

    how="hash": units with positions below `test` are the test split, the next `validation` share the validation split.
    Shares are right on average. Adding rows never moves another.

    how="stratified": each class (`classes` of a row; a unit's is that of most of its rows) is cut by itself, its units
    ordered by position: shares are right to half a unit in every class. A class of three units has one in each split,
    one of two is in train and test, one of a single unit in train. What remains when a row is added: no row of another
    class moves, and of its own class at most one unit crosses each of the two cuts (where units are single texts;
    a row that changes which class is a group's most frequent moves the group).

    Raises DataError if a wanted split gets no row, or if rows have no column `group`.
    """
    units = _units(rows, key, group)
    names = _by_position(units, test, validation)
    if how == "stratified":
        names = _by_class(rows, units, classes or (lambda row: None), test, validation)
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row, unit in zip(rows, units, strict=True):
        parts[names[unit]].append(row)
    _require_filled(parts, {"train": 1.0, "validation": validation, "test": test}, len(rows), group)
    return Splits(**parts)


def _units(rows: Sequence[Row], key: Callable[[Row], str], group: str | None) -> list[str]:
    """For each row the text that is hashed for it."""
    if group is None:
        return [key(row) for row in rows]
    if rows and not any(group in row for row in rows):
        raise DataError(
            f"no row has a column {group!r}",
            expected=f"one of {', '.join(map(repr, rows[0]))}",
            todo="name the column whose rows belong together",
        )
    return [str(row[group]) if row.get(group) is not None else key(row) for row in rows]


def _by_position(units: Sequence[str], test: float, validation: float) -> dict[str, str]:
    places = {unit: position(unit) for unit in units}
    return {
        unit: "test" if place < test else "validation" if place < test + validation else "train"
        for unit, place in places.items()
    }


def _by_class(
    rows: Sequence[Row], units: Sequence[str], classes: Callable[[Row], str | None], test: float, validation: float
) -> dict[str, str]:
    votes: dict[str, Counter[str | None]] = {}
    for row, unit in zip(rows, units, strict=True):
        votes.setdefault(unit, Counter())[classes(row)] += 1
    strata: dict[str | None, list[str]] = {}
    for unit, counts in votes.items():
        most = min(counts, key=lambda name: (-counts[name], name is None, name or ""))
        strata.setdefault(most, []).append(unit)
    sizes = {unit: counts.total() for unit, counts in votes.items()}
    return dict(one for stratum in strata.values() for one in _cut(stratum, sizes, test, validation))


def _cut(units: Sequence[str], sizes: Mapping[str, int], test: float, validation: float) -> Iterator[tuple[str, str]]:
    """Units in the order of their positions: the test split's, the validation split's, the rest.

    A unit is before a cut if its middle is: of n single rows round(share * n) are.
    """
    order = sorted(units, key=lambda unit: (position(unit), unit))
    total, seen, middles = sum(sizes[unit] for unit in order), 0, []
    for unit in order:
        middles.append(seen + sizes[unit] / 2)
        seen += sizes[unit]
    first = sum(middle < test * total for middle in middles)
    second = sum(middle < (test + validation) * total for middle in middles)
    if test and len(order) > 1:
        first = max(first, 1)
    if validation and len(order) > (2 if test else 1):
        second = max(second, first + 1)
    last = len(order) - 1  # one is left for training
    for index, unit in enumerate(order):
        yield unit, "test" if index < min(first, last) else "validation" if index < min(second, last) else "train"


def _require_filled(
    parts: Mapping[str, Sequence[Row]], wanted: Mapping[str, float], rows: int, group: str | None
) -> None:
    empty = [name for name, part in parts.items() if wanted[name] and not part]
    if empty:
        of = f" in groups by {group!r}" if group else ""
        raise DataError(
            f"{rows} rows{of} leave the {' and '.join(empty)} split empty",
            expected="enough rows for three splits (a few dozen at least)",
            todo="add rows, or name files of your own with --validation-data and --test-data",
        )


def at_most(rows: Sequence[Row], limit: int | None, key: Callable[[Row], str]) -> list[Row]:
    """`limit` rows in their order, chosen by a hash of their text (salted, so independent of the split)."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    order = sorted(range(len(rows)), key=lambda index: position("limit:" + key(rows[index])))
    return [rows[index] for index in sorted(order[:limit])]
