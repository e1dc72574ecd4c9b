"""Rows from whatever holds them: files, folders, hub ids, objects in memory. All at once, or one at a time.

A reader (one file each: separated, json_lines, conll, ...) turns a source into parts, a stream of numbered rows for
each split that the source itself holds. `stream_rows` hands that stream on, `read_rows` ends at its first problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightsft.data.data_sets import hub_parts
from lightsft.data.file_kinds import KINDS, file_parts, kind_of
from lightsft.data.folders import folder_parts
from lightsft.data.in_memory import described, memory_parts
from lightsft.data.parts import WHOLE, Numbered, Part, Parts, Row, choose, split_name
from lightsft.errors import DataError

__all__ = [
    "Numbered", "Row", "all_rows", "read_rows", "read_splits", "require_columns", "size_bytes", "stream_rows",
    "stream_splits", "unreadable",
]  # fmt: skip

Source = Any  # str | Path: a file, a folder or a hub id; else rows in memory (see in_memory.EXPECTED)


def read_rows(source: Source, *, split: str = "train", encoding: str = "utf-8") -> list[Row]:
    """All rows, in order. In a data set with several splits, `split` is taken.

    Raises DataError for a missing or empty file, an unknown type, a wrong encoding, or a row that does not parse.
    """
    return _strict(stream_rows(source, split=split, encoding=encoding), _name(source))


def read_splits(source: Source, *, encoding: str = "utf-8") -> dict[str, list[Row]]:
    """The rows of every split that the source itself holds, else all of them as "train".

    valid, val and dev are "validation" here. Raises what read_rows raises.
    """
    return {split: all_rows(part, _name(source)) for split, part in stream_splits(source, encoding=encoding).items()}


def stream_splits(source: Source, *, encoding: str = "utf-8") -> dict[str, Part]:
    """What read_splits reads, to be opened one row at a time as in stream_rows; `size_bytes` is 0 where unknown."""
    name, parts = _name(source), _renamed(_parts(source, encoding))
    whole = Path(source).stat().st_size if isinstance(source, str | Path) and Path(source).is_file() else 0
    return {split: Part(partial(_filled, part, name), part.size_bytes or whole) for split, part in parts.items()}


def all_rows(part: Part, name: str) -> list[Row]:
    """The rows of a split; DataError naming the first that cannot be read."""
    return _strict(part.open(), name)


def stream_rows(source: Source, *, split: str = "train", encoding: str = "utf-8") -> Iterator[Numbered]:
    """The rows one at a time, each with its number or with what is wrong with it, in bounded memory.

    Bounded by a line in jsonl, a record in csv (an open quote is given up after 64 Mi characters), a sentence in CoNLL,
    a row group of parquet at most, a record batch of arrow. A .json document is held whole.
    Raises DataError for what cannot be read at all: a missing, empty or unknown file, one in another encoding from its
    first byte, a header with a name twice.
    """
    return _filled(choose(_parts(source, encoding), split, _name(source)), _name(source))


def size_bytes(source: Source, *, split: str = "train", encoding: str = "utf-8") -> int:
    """What `Numbered.position` grows to while this is streamed; 0 where nobody can say (memory, a hub id)."""
    if isinstance(source, str | Path) and Path(source).is_file():
        return Path(source).stat().st_size
    known = isinstance(source, str | Path) and Path(source).is_dir()
    return choose(_parts(source, encoding), split, _name(source)).size_bytes if known else 0


def require_columns(rows: Sequence[Row], columns: Sequence[str], source: str) -> None:
    """Raise DataError naming every column that is missing, and those that are there."""
    present = list(rows[0])
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}",
            expected=f"one of its columns: {', '.join(map(repr, present))}",
            todo="name the right ones with --text and --label",
        )


def _parts(source: Source, encoding: str) -> Parts:
    if not isinstance(source, str | Path):
        return memory_parts(source)
    path = Path(source)
    if path.is_dir():
        return folder_parts(path, encoding)
    return file_parts(path, encoding) if kind_of(path) or path.is_file() else hub_parts(str(source), KINDS)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else described(source)


def _filled(part: Part, name: str) -> Iterator[Numbered]:
    """The part's rows; an error where there is none."""
    one = None
    for one in part.open():
        yield one
    if one is None:
        raise DataError(f"{name} holds no rows", expected="at least one row of data below the header")


def _strict(stream: Iterator[Numbered], name: str) -> list[Row]:
    rows: list[Row] = []
    for one in stream:
        if one.problem is not None or one.row is None:
            raise unreadable(one, name)
        rows.append(one.row)
    return rows


def unreadable(one: Numbered, name: str) -> DataError:
    """What is wrong with a row, as an error."""
    found, expected, todo = "is not there", "", ""
    if one.problem is not None:
        found, expected, todo = one.problem.found, one.problem.expected, one.problem.todo
    where = f" (line {one.line})" if one.line is not None and " line " not in found else ""
    return DataError(f"{name}: row {one.number} {found}{where}", expected=expected, todo=todo)


def _renamed(parts: Parts) -> Parts:
    """Splits under the names train, validation and test, unless two of them would get the same."""
    if WHOLE in parts:
        return {"train": parts[WHOLE]}
    names = [split_name(name) or name for name in parts]
    return dict(zip(names if len(set(names)) == len(names) else parts, parts.values(), strict=True))
