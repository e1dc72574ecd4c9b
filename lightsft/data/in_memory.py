"""Rows that are in memory already: a list of dicts, a dict of columns, a pandas DataFrame, splits of these."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightsft.data.data_sets import data_set_parts
from lightsft.data.parts import WHOLE, Part, Parts, numbered, split_name
from lightsft.errors import DataError

EXPECTED = "a path, a hub id, a list of dicts, a dict of columns, a pandas DataFrame, or a datasets.Dataset"


def memory_parts(source: Any) -> Parts:
    """The rows of an object. A cell of a DataFrame that holds NaN is missing: None."""
    if _is(source, "datasets", "Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict"):
        return data_set_parts(source)
    if _is(source, "pandas", "DataFrame"):
        return _whole(_frame_rows(source))
    if isinstance(source, Mapping):
        return _of_mapping(source)
    if isinstance(source, Sequence):
        return _whole(source)
    raise DataError(f"the data is a {type(source).__name__}", expected=EXPECTED)


def described(source: Any) -> str:
    """How errors name it."""
    return "the data" if isinstance(source, Mapping | Sequence) else f"the {type(source).__name__}"


def _whole(rows: Sequence[Any]) -> Parts:
    return {WHOLE: Part(partial(numbered, rows))}


def _is(source: Any, module: str, *names: str) -> bool:
    """Whether it is of one of these classes. A module that was never imported has no objects."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(source, tuple(getattr(loaded, name) for name in names))


def _of_mapping(source: Mapping[Any, Any]) -> Parts:
    """Splits, if every name is one; else columns."""
    if source and all(split_name(str(name)) for name in source):
        return {str(name): next(iter(memory_parts(rows).values())) for name, rows in source.items()}
    columns = {str(name): list(values) for name, values in source.items() if not isinstance(values, str)}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(columns) < len(source) or len(set(lengths.values())) > 1:
        found = ", ".join(f"{name!r}: {count}" for name, count in lengths.items())
        raise DataError(
            f"the columns have different lengths: {found}", expected="a list of values per column, all of one length"
        )
    return _whole([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


def _frame_rows(frame: Any) -> list[dict[str, Any]]:
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the DataFrame names {', '.join(map(repr, twice))} twice", expected="different columns")
    cells = frame.astype(object).where(frame.notna(), None)
    return [dict(zip(names, values, strict=True)) for values in cells.itertuples(index=False, name=None)]
