"""Rows of what a tensor of a new checkpoint is made of, read from disk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightsft.export.checkpoint_files import StoredTensor
from lightsft.export.layout import TYPES, Entry
from lightsft.row_changes import as_matrix

if TYPE_CHECKING:
    from lightsft.export.recoding import Rows


class StoredRows:
    """What an entry holds before its change: as stored, or what the codes of that stand for; zeros beyond its end."""

    def __init__(self, entry: Entry, columns: int | None = None) -> None:
        """`columns` of each matrix, where the tensor is several."""
        self.entry = entry
        self.columns = as_matrix(entry.shape)[1] if columns is None else columns
        self._recoded: Rows | None = None
        if entry.recoding is not None and entry.source is not None:
            self._recoded = entry.recoding.by_rows(as_matrix(entry.source.shape)[0], self.columns, self._as_stored)

    def __call__(self, rows: slice, first: int = 0) -> Tensor:
        """(rows, columns), those of the tensor counted from `first`."""
        before = self._as_stored(slice(first + rows.start, first + rows.stop))
        return before if self._recoded is None else self._recoded(before, rows)

    def _as_stored(self, rows: slice) -> Tensor:
        source = self.entry.source
        start, stop = rows.start * self.columns, rows.stop * self.columns
        held = start if source is None else max(start, min(stop, math.prod(source.shape)))
        found = torch.zeros(stop - start, dtype=TYPES[self.entry.dtype])
        if source is not None and held > start:
            found[: held - start] = read_values(source, slice(start, held))
        return found.view(-1, self.columns)


def read_values(tensor: StoredTensor, values: slice) -> Tensor:
    """Some of the tensor's numbers, counted in order."""
    dtype = TYPES[tensor.dtype]
    size = (values.stop - values.start) * dtype.itemsize
    return torch.frombuffer(bytearray(read_bytes(tensor, values.start * dtype.itemsize, size)), dtype=dtype)


def read_bytes(tensor: StoredTensor, first: int, size: int) -> bytes:
    """Some of its bytes."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + first)
        return file.read(size)
