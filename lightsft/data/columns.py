"""Which column is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightsft.data.reading import Row
from lightsft.errors import DataError


@dataclass(frozen=True)
class ColumnKind:
    """What a column may be called and what is in it."""

    names: tuple[str, ...]
    kind: str = "text"
    optional: bool = False


@dataclass(frozen=True)
class Found:
    """A column, and how it was found."""

    column: str
    why: str


def guess(
    rows: Sequence[Row], wanted: Mapping[str, ColumnKind], *, taken: set[str] = frozenset(), source: str = "the data"
) -> dict[str, Found]:
    """By name only, until content is looked at."""
    found: dict[str, Found] = {}
    present = {name.lower(): name for name in rows[0] if name not in taken}
    for field, kind in wanted.items():
        hit = next((present[name] for name in kind.names if name in present), None)
        if hit is not None:
            found[field] = Found(hit, "by its name")
        elif not kind.optional:
            raise DataError(f"{source} has no column for {field}")
    return found
