"""Data sets of the `datasets` library: saved folders, hub ids, and objects in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightsft.data.parts import WHOLE, Numbered, Part, Parts, numbered
from lightsft.errors import DataError, first_line

SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")  # what save_to_disk writes beside the rows


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((folder / name).is_file() for name in SAVED)


def saved_parts(folder: Path) -> Parts:
    """The rows of a saved folder."""
    import datasets

    try:
        return data_set_parts(datasets.load_from_disk(str(folder)))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is damaged: {first_line(error)}", expected="what save_to_disk wrote") from error


def hub_parts(name: str, kinds: str) -> Parts:
    """The rows of a hub's data set. kinds: what else could have been named, for the error."""
    import datasets

    try:
        return data_set_parts(datasets.load_dataset(name))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise DataError(
            f"cannot read {name!r}: {first_line(error)}",
            expected=f"a {kinds} file, a folder, or a hub id that can be reached",
            todo="check the path",
        ) from error


def data_set_parts(data: Any) -> Parts:
    """The rows of a Dataset, an IterableDataset, or a dict of them by split."""
    if isinstance(data, Mapping):
        return {str(name): Part(partial(_rows, split)) for name, split in data.items()}
    return {WHOLE: Part(partial(_rows, data))}


def _rows(data: Any) -> Iterator[Numbered]:
    return numbered(_named(_undecoded(data)))


def _named(data: Any) -> Iterator[Any]:
    """Rows with the names of classes in the place of their numbers, also in lists of them; -1 is no class."""
    import datasets

    classes = {}
    for column, feature in (data.features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            classes[column] = inner.names
    for row in data:
        yield {**row, **{column: _name(row[column], names) for column, names in classes.items()}} if classes else row


def _name(cell: Any, names: Sequence[str]) -> Any:
    if isinstance(cell, list):
        return [_name(one, names) for one in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None


def _undecoded(data: Any) -> Any:
    """Images and sounds stay {"bytes", "path"}: decoding them needs their libraries."""
    import datasets

    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio) and feature.decode:
            data = data.cast_column(name, type(feature)(decode=False))
    return data.with_format(None)
