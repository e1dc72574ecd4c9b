"""Rows from a csv, tsv, jsonl, json or parquet file, or a `datasets` data set (a saved folder or a hub id)."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lightsft.errors import DataError

Row = Mapping[str, Any]
FILE_TYPES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def read_rows(source: str | Path, *, split: str = "train", encoding: str = "utf-8") -> list[Row]:
    """All rows, in order. In a data set with several splits, `split` is taken.

    Raises DataError for a missing or empty file, an unknown type, a wrong encoding, or a row that does not parse.
    """
    path = Path(source)
    if path.is_dir():
        rows = _read_saved(path, split)
    elif path.suffix.lower() in FILE_TYPES:
        rows = _read_file(path, encoding)
    else:
        rows = _read_hub(str(source), split)
    if not rows:
        raise DataError(f"{source} holds no rows", expected="at least one row of data below the header")
    return rows


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


def _read_file(path: Path, encoding: str) -> list[Row]:
    if not path.is_file():
        raise DataError(f"no file {path}", expected=f"a {', '.join(FILE_TYPES)} file", todo="check the path")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", expected="a header and at least one row")
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path)
        if path.suffix.lower() in (".jsonl", ".json"):
            return _read_json(path, encoding)
        return _read_separated(path, encoding, "\t" if path.suffix.lower() == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not {encoding}: byte {error.object[error.start]:#x} at offset {error.start}",
            expected=f"text encoded as {encoding}",
            todo="name its encoding, for example --encoding latin-1",
        ) from error
    except LookupError as error:
        raise DataError(str(error), expected="an encoding that Python knows, such as utf-8 or latin-1") from error


def _read_separated(path: Path, encoding: str, separator: str) -> list[Row]:
    """Strict: each row has the header's number of fields, quotes are closed. Blank lines are skipped."""
    limit = csv.field_size_limit(2**31 - 1)  # texts may be long
    try:
        lines = csv.reader(StringIO(_decoded(path, encoding), newline=""), delimiter=separator, strict=True)
        header = next(lines, [])
        rows: list[Row] = []
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise csv.Error(f"the header names {', '.join(map(repr, twice))} twice")
        for fields in lines:
            if len(fields) not in (0, len(header)):
                raise csv.Error(f"{len(fields)} fields instead of {len(header)}")
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{path} does not parse: {error} in line {lines.line_num}",
            expected="a header and the same number of fields in every row",
            todo="quote fields that contain the separator or a line break, and double the quotes inside them",
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged: {error}", expected="a parquet file") from error
    return rows


def _decoded(path: Path, encoding: str) -> str:
    """The text of a file, without the byte-order mark that spreadsheets write."""
    return path.read_bytes().decode(encoding).removeprefix("\ufeff")


def _read_json(path: Path, encoding: str) -> list[Row]:
    text = _decoded(path, encoding)
    if path.suffix.lower() == ".json":
        rows = _parse(text, path, 1)
        if not isinstance(rows, list):
            raise DataError(f"{path} holds a JSON {type(rows).__name__}", expected="a list of objects")
    else:
        rows = [_parse(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: row {number} is not an object but {str(row)[:60]!r}", expected="one object per row"
            )
    return list(rows)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1} is not JSON: {error.msg}",
            expected="one JSON object per line",
        ) from error


def _read_saved(path: Path, split: str) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is a folder, but not a saved data set", expected="what save_to_disk wrote") from error
    return _one_split(loaded, split, str(path))


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    try:
        return _one_split(datasets.load_dataset(name), split, name)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise DataError(
            f"cannot read {name!r}: {str(error).strip().splitlines()[0]}",
            expected=f"a {', '.join(FILE_TYPES)} file, a saved data set, or a hub id that can be reached",
            todo="check the path",
        ) from error


def _one_split(loaded: Any, split: str, source: str) -> list[Row]:
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{source} has no split {split!r}", expected=f"one of {', '.join(loaded)}")
        loaded = loaded[split]
    return [dict(row) for row in loaded]
