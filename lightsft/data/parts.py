"""What every reader gives: numbered rows, one stream of them for each split that a source holds itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lightsft.data.problems import Problem
from lightsft.errors import DataError

Row = Mapping[str, Any]
WHOLE = ""  # the name of the only part of a source without splits of its own

ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


class Numbered(NamedTuple):
    """One row as it was read, or why it could not be.

    number: from 1. row: None where there is a problem. line: in the file, from 1, where the row begins. position:
    bytes read so far (of the compressed file, where it is one).
    """

    number: int
    row: Row | None
    problem: Problem | None = None
    line: int | None = None
    position: int = 0


class Part(NamedTuple):
    """One split: `open` begins reading it, again with every call; `size_bytes` is what `position` grows to."""

    open: Callable[[], Iterator[Numbered]]
    size_bytes: int = 0


Parts = dict[str, Part]


def split_name(name: str) -> str | None:
    """train, validation or test for the names in use; None for any other."""
    return next((split for split, names in ALIASES.items() if name.lower() in names), None)


def choose(parts: Parts, split: str, source: str) -> Part:
    """The part of that name, or of another name for the same split. A source without splits is one part."""
    if WHOLE in parts:
        return parts[WHOLE]
    same = [name for name in parts if name == split] or [name for name in parts if _same(name, split)]
    if not same:
        raise DataError(f"{source} has no split {split!r}", expected=f"one of {', '.join(parts)}")
    return parts[same[0]]


def _same(name: str, split: str) -> bool:
    return split_name(name) is not None and split_name(name) == split_name(split)


def numbered(rows: Iterable[Any], position: int = 0) -> Iterator[Numbered]:
    """Values that were parsed already: each that is no object comes as a problem."""
    for number, row in enumerate(rows, 1):
        problem = not_an_object(row)
        yield Numbered(number, None if problem else row, problem, position=position)


def not_an_object(row: Any) -> Problem | None:
    """The problem of a value that is no mapping of columns to values."""
    if isinstance(row, Mapping):
        return None
    return Problem("not_an_object", f"is not an object but {str(row)[:60]!r}", expected="one object per row")
