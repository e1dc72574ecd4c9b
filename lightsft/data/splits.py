"""Train, validation and test by hash of the text: the same text always lands in the same split, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightsft.data.reading import Row
from lightsft.errors import DataError


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
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_rows(rows: Sequence[Row], key: Callable[[Row], str], *, validation: float = 0.1, test: float = 0.1) -> Splits:
    """The `test` share with the lowest positions is the test split, the next `validation` share the validation split.

    A share of 0 leaves that split empty. Raises DataError if a wanted one gets no row.
    """
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        place = position(key(row))
        parts["test" if place < test else "validation" if place < test + validation else "train"].append(row)
    wanted = {"train": 1.0, "validation": validation, "test": test}
    empty = [name for name, part in parts.items() if wanted[name] and not part]
    if empty:
        raise DataError(
            f"{len(rows)} rows leave the {' and '.join(empty)} split empty",
            expected="enough rows for three splits (a few dozen at least)",
            todo="add rows, or name files of your own with --validation-data and --test-data",
        )
    return Splits(**parts)


def at_most(rows: Sequence[Row], limit: int | None, key: Callable[[Row], str]) -> list[Row]:
    """`limit` rows in their order, chosen by a hash of their text (salted, so independent of the split)."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    order = sorted(range(len(rows)), key=lambda index: position("limit:" + key(rows[index])))
    return [rows[index] for index in sorted(order[:limit])]
