"""Write a changed checkpoint from disk to disk: shard by shard, in tiles, without a model.

Bytes that do not change are copied by the kernel; of a tensor that changes some rows at a time are read, changed in
fp32, rounded once and written. Memory does not depend on the size of the checkpoint. The base is only read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightsft.export.checkpoint_files import INDEX_FILE, Checkpoint, StoredTensor
from lightsft.export.layout import TYPES, Entry, Written, WrittenFile, index_of
from lightsft.files import write_json
from lightsft.low_rank import rows_in_tile, tiles
from lightsft.row_changes import RowChange, as_matrix

if TYPE_CHECKING:
    from lightsft.export.recoding import Rows

BLOCK = 2**20  # bytes that a thread reads at once
COPY = 2**26  # bytes that the kernel is asked to copy at once
THREADS = 4
MEASURED = 16  # tiles of a matrix, spread over it, on which the rounding is measured; all of one that has fewer
Report = Callable[[int], object]  # is told how many bytes more are written


def write(checkpoint: Checkpoint, files: Sequence[WrittenFile], folder: Path, report: Report | None = None) -> None:
    """Write the planned files, and their index if there is one, to `folder`; each is on the disk when it returns."""
    tell = report or (lambda size: None)
    threads = min(THREADS, os.cpu_count() or 1)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool, _restored(before):
        for file in files:
            with ExitStack() as stack:
                out = stack.enter_context(_opened(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL))
                os.truncate(out, file.size)
                _write_all(out, file.header, 0)
                stored = (t.entry.source for t in file.tensors if t.entry.source is not None)
                sources = {
                    path: stack.enter_context(_opened(path, os.O_RDONLY))
                    for path in dict.fromkeys(source.file for source in stored)
                }
                _write_pieces(file, sources, out, pool, 2 * threads, tell)
                os.fsync(out)
    if len(files) > 1:
        write_json(folder / INDEX_FILE, index_of(checkpoint, files))


@contextmanager
def _restored(threads: int) -> Iterator[None]:
    """Afterwards torch computes with so many threads again, whatever others have set."""
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---- pieces of a file: read and changed by several threads, written by one, since a file has one lock


def _write_pieces(
    file: WrittenFile, sources: Mapping[Path, int], out: int, pool: Executor, most: int, report: Report
) -> None:
    waiting: deque[tuple[_Edit, Future[Tensor], _Space]] = deque()
    free = [_Space() for _ in range(most)]
    for piece in _pieces(file, sources, pool):
        if isinstance(piece, _Copy):
            _copy_bytes(sources[piece.source], out, piece.start, piece.stop, piece.start + piece.shift)
            _start_writing(out, piece.start + piece.shift, piece.stop - piece.start)
            report(piece.stop - piece.start)
            continue
        if not free:
            free.append(_write_next(waiting, out, report))
        space = free.pop()
        waiting.append((piece, pool.submit(piece.changed, sources, space), space))
    while waiting:
        _write_next(waiting, out, report)


class _Space:
    """Memory for one piece, used again and again: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self.before, self.after = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)

    def of(self, rows: int, columns: int, source: torch.dtype, target: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two tensors (rows, columns), one and the same where the types are."""
        self.before, before = _held(self.before, rows, columns, source)
        if source == target:
            return before, before
        self.after, after = _held(self.after, rows, columns, target)
        return before, after


def _held(memory: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = rows * columns * dtype.itemsize
    if len(memory) < size:
        memory = torch.empty(size, dtype=torch.uint8)
    return memory, memory[:size].view(dtype).view(rows, columns)


def _write_next(waiting: deque[tuple[_Edit, Future[Tensor], _Space]], out: int, report: Report) -> _Space:
    piece, changed, space = waiting.popleft()
    size = _write_all(out, _bytes(changed.result()), piece.place)
    _start_writing(out, piece.place, size)
    report(size)
    return space


def _pieces(file: WrittenFile, sources: Mapping[Path, int], pool: Executor) -> Iterator[_Copy | _Edit]:
    """In order; neighbours that are copied are copied together."""
    run: list[Written] = []
    for tensor in file.tensors:
        copied = tensor.entry.copied and tensor.dtype == tensor.entry.dtype
        if run and not (copied and _follows(run[-1], tensor)):
            yield from _copies(run)
            run = []
        if copied:
            run.append(tensor)
        else:
            yield from _edits(tensor, _recoded(tensor.entry, sources, pool))
    yield from _copies(run)


def _follows(one: Written, other: Written) -> bool:
    before, after = _stored(one), _stored(other)
    return (before.file, before.stop, one.stop) == (after.file, after.start, other.start)


def _stored(tensor: Written) -> StoredTensor:
    assert tensor.entry.source is not None
    return tensor.entry.source


def _copies(run: Sequence[Written]) -> Iterator[_Copy]:
    if not run:
        return
    first, last = _stored(run[0]), _stored(run[-1])
    for begin in range(first.start, last.stop, COPY):
        yield _Copy(first.file, begin, min(begin + COPY, last.stop), run[0].start - first.start)


@dataclass(frozen=True)
class _Copy:
    """Bytes of a file, as they are."""

    source: Path
    start: int
    stop: int
    shift: int


def _copy_bytes(source: int, out: int, start: int, stop: int, place: int) -> None:
    """From one open file to another: by the kernel where it can, shared where the file system can."""
    by_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        count = 0
        if by_kernel:
            try:
                count = os.copy_file_range(source, out, min(stop - start, COPY), start, place)
            except OSError:  # between file systems, or on one that cannot
                by_kernel = False
        if not by_kernel:
            count = _write_all(out, os.pread(source, min(stop - start, BLOCK), start), place)
        if count == 0:
            raise OSError(f"the file ends at byte {start}, and was longer when its header was read")
        start, place = start + count, place + count


def _recoded(entry: Entry, sources: Mapping[Path, int], pool: Executor) -> Future[Rows] | None:
    """What rows of a matrix stand for, once whatever has to be known of the whole of it is."""
    source = entry.source
    if entry.recoding is None or source is None:
        return None
    rows, columns = as_matrix(source.shape)
    return pool.submit(entry.recoding.by_rows, rows, columns, lambda part: _rows_of(source, sources, part))


def _rows_of(source: StoredTensor, sources: Mapping[Path, int], rows: slice) -> Tensor:
    columns, kind = as_matrix(source.shape)[1], TYPES[source.dtype]
    found = torch.empty(rows.stop - rows.start, columns, dtype=kind)
    _read_all(sources[source.file], found, source.start + rows.start * columns * kind.itemsize)
    return found


def _edits(tensor: Written, recoded: Future[Rows] | None) -> Iterator[_Edit]:
    """Blocks of whole tiles of each matrix."""
    entry = tensor.entry
    changes: Sequence[RowChange | None] = [None] if entry.change is None else entry.change.matrices()
    rows, columns = _shape(entry)
    step = rows_in_tile(columns)
    block = step * max(1, BLOCK // max(1, step * columns * TYPES[entry.dtype].itemsize))
    for number, change in enumerate(changes):
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            yield _Edit(tensor, change, number * rows, slice(start, stop), columns, recoded)


def _shape(entry: Entry) -> tuple[int, int]:
    """(rows, columns) of each of its matrices."""
    if entry.change is not None:
        rows, columns = entry.change.shape[-2:]
        return rows, columns
    return as_matrix(entry.shape)


@dataclass(frozen=True)
class _Edit:
    """Rows of one matrix of a tensor; those of the tensor itself are counted from `first`."""

    tensor: Written
    change: RowChange | None
    first: int
    rows: slice
    columns: int
    recoded: Future[Rows] | None = None

    @property
    def place(self) -> int:
        """The byte of the new file at which it begins."""
        return self.tensor.start + self._offset * TYPES[self.tensor.dtype].itemsize

    @property
    def _offset(self) -> int:
        return int((self.first + self.rows.start) * self.columns)

    def changed(self, sources: Mapping[Path, int], space: _Space) -> Tensor:
        """The new values, of the base's in open files."""
        kind, target = TYPES[self.tensor.entry.dtype], TYPES[self.tensor.dtype]
        count = self.rows.stop - self.rows.start
        before, after = space.of(count, self.columns, kind, target)
        self._read(sources, before)
        if self.recoded is not None:
            before = self.recoded.result()(before, self.rows)
        for part in tiles(count, self.columns):
            rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
            changed = before[part] if self.change is None else self.change.change(before[part], rows)
            if self.change is not None and self._is_measured(rows):
                self._measure(before[part], changed, changed.to(target))
            after[part] = changed
        return after

    def _read(self, sources: Mapping[Path, int], into: Tensor) -> None:
        """The stored rows; zeros for those that the base does not have."""
        source = self.tensor.entry.source
        stored = 0 if source is None else as_matrix(source.shape)[0] - self.rows.start
        if self.tensor.entry.grows and stored < len(into):
            into[max(0, stored) :] = 0
            into = into[: max(0, stored)]
        if source is not None:
            _read_all(sources[source.file], into, source.start + self._offset * TYPES[source.dtype].itemsize)

    def _is_measured(self, rows: slice) -> bool:
        size = rows_in_tile(self.columns)
        every = max(1, _shape(self.tensor.entry)[0] // (size * MEASURED))
        return bool((rows.start // size) % every == 0)

    def _measure(self, before: Tensor, changed: Tensor, stored: Tensor) -> None:
        delta = _square(changed - before)
        error = 0.0 if stored.dtype == changed.dtype else _square(stored.float().sub_(changed))
        self.tensor.lost.parts.append((changed.numel(), delta, error))


def _square(values: Tensor) -> float:
    flat = values.flatten()
    return float(torch.dot(flat, flat))


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.view(torch.uint8).numpy()
    return memoryview(values).cast("B")


def _read_all(descriptor: int, into: Tensor, place: int) -> None:
    view = _bytes(into)
    while view:
        count = os.preadv(descriptor, [view], place)
        if count == 0:
            raise OSError("the file is shorter than its header says")
        view, place = view[count:], place + count


def _start_writing(out: int, place: int, size: int) -> None:
    """Let the system bring these bytes to the disk while others are computed, so that `fsync` need not wait for all."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(out, place, size, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, content: bytes | memoryview, place: int) -> int:
    view, size = memoryview(content), len(content)
    while view:
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count
    return size
