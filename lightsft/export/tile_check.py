"""A merged checkpoint, checked against base and adapter from disk, in fp64: for those that are too large to load.

Every tensor must be there with its type and shape. Of each that was changed some rows are computed again, by the
formula in fp64, and must be what is stored to within one rounding:

    |stored - exact| <= eps / 2 |exact| + 8 eps_32 (|W| + |B| |A|)

Of each that was not changed, some bytes must be the base's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightsft.errors import MergeError
from lightsft.export.checkpoint_files import Checkpoint, StoredTensor, read_checkpoint
from lightsft.export.from_disk import DiskMerge
from lightsft.export.layout import TYPES, Entry
from lightsft.export.stored_rows import StoredRows, read_bytes, read_values
from lightsft.row_changes import RowChange, as_matrix

VALUES, PLACES = 2**15, 4  # of each tensor: numbers computed again, in so many places
BYTES = 2**16  # of each tensor that was copied, in as many places
SHOWN = 12


def check_tiles(merge: DiskMerge, folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """What was compared and what differs: `passed`, and the first problems."""
    merged, drawn = read_checkpoint(folder), random.Random(seed)
    problems = list(_layout_problems(merge, merged))
    compared, worst = 0, 0.0
    if not problems:
        for name, entry in merge.entries.items():
            stored = merged.tensors[name]
            if entry.copied:
                problems += _copied_problems(entry, stored, drawn)
                continue
            for off, number in _rows_off(entry, stored, drawn):
                compared, worst = compared + number, max(worst, off)
                if not off <= 1:
                    problems.append(f"{name}: off by {off:.3g} times a rounding")
                    break
    return {
        "passed": not problems,
        "problems": problems[:SHOWN],
        "compared": "rows of every changed tensor with W + s B A in fp64, bytes of every other with the base's, "
        "read from disk",
        "changed_tensors": sum(not entry.copied for entry in merge.entries.values()),
        "values_compared": compared,
        "largest_difference_in_roundings": worst,
    }


def require_same_tiles(found: dict[str, Any]) -> dict[str, Any]:
    """What `check_tiles` found; raise MergeError if something differs."""
    if not found["passed"]:
        raise MergeError(
            "the merged checkpoint differs from base + adapter:\n  " + "\n  ".join(found["problems"]),
            expected="W + delta, rounded once, and the base's bytes everywhere else",
            todo="merge again; if it differs again, look at the disk and the memory of this machine",
        )
    return found


def _layout_problems(merge: DiskMerge, merged: Checkpoint) -> Iterator[str]:
    wanted = {t.entry.name: (t.dtype, t.entry.shape) for file in merge.files for t in file.tensors}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in merged.tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            yield f"{name}: {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing of that name')}"


def _copied_problems(entry: Entry, stored: StoredTensor, drawn: random.Random) -> list[str]:
    source = entry.source
    assert source is not None
    if source.dtype != stored.dtype:
        values = math.prod(source.shape)
        first = drawn.randrange(max(1, values - BYTES))
        part = slice(first, min(first + BYTES, values))
        same = torch.equal(read_values(source, part).to(TYPES[stored.dtype]), read_values(stored, part))
        return [] if same else [f"{entry.name}: not the base's values, rounded"]
    for _ in range(PLACES):
        first = drawn.randrange(max(1, source.size - BYTES))
        size = min(BYTES, source.size - first)
        if read_bytes(source, first, size) != read_bytes(stored, first, size):
            return [f"{entry.name}: not the base's bytes"]
    return []


def _rows_off(entry: Entry, stored: StoredTensor, drawn: random.Random) -> Iterator[tuple[float, int]]:
    """(largest difference as a share of what one rounding may cost, numbers compared) of some rows."""
    changes: Sequence[RowChange | None] = [None] if entry.change is None else entry.change.matrices()
    rows, columns = as_matrix(entry.shape) if entry.change is None else entry.change.shape[-2:]
    count = min(rows, max(1, VALUES // (PLACES * columns)))
    before = StoredRows(entry, columns)
    for _ in range(PLACES):
        number, start = drawn.randrange(len(changes)), drawn.randrange(rows - count + 1)
        part, change, first = slice(start, start + count), changes[number], number * rows
        weight = before(part, first)
        after = read_values(stored, slice((first + start) * columns, (first + start + count) * columns))
        after = after.view(-1, columns)
        exact, reach = (weight.double(), weight.double().abs()) if change is None else change.exact(weight, part)
        rounding = torch.finfo(after.dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * reach
        smallest = torch.finfo(after.dtype).tiny
        yield float(((after.double() - exact).abs() / (rounding + smallest)).max()), exact.numel()
