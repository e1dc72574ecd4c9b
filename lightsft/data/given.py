"""Which splits are given: by the data itself, or in sources of their own."""

from __future__ import annotations

from functools import partial

from lightsft.data.parts import Part
from lightsft.data.reading import Source, size_bytes, stream_rows, stream_splits
from lightsft.errors import DataError


def given_splits(
    data: Source, validation_data: Source = None, test_data: Source = None, *, encoding: str = "utf-8"
) -> dict[str, tuple[str, Part]]:
    """(where from, rows) of train, and of validation and test where they are given; nothing is read yet.

    A source of its own takes the place of a split that the data holds. Raises DataError if there is none to train on.
    """
    found = stream_splits(data, encoding=encoding)
    own = {"validation": validation_data, "test": test_data}
    if "train" not in found:
        raise DataError(
            f"{data} has no split to train on", expected=f"train; it has {', '.join(found)}", todo="name a file"
        )
    parts = {name: (str(data), found[name]) for name in ("train", *own) if name in found}
    return parts | {
        name: (str(file), Part(partial(stream_rows, file, encoding=encoding), size_bytes(file, encoding=encoding)))
        for name, file in own.items()
        if file is not None
    }
