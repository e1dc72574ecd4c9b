"""Write a changed checkpoint from disk to disk: shard by shard, in tiles, without a model.

Bytes that do not change are copied by the kernel; of a tensor that changes some rows at a time are read, changed in
fp32, rounded once and written. Memory does not depend on the size of the checkpoint. The base is only read.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightsft.export.checkpoint_files import INDEX_FILE, SINGLE_FILE, Checkpoint, Shard, StoredTensor
from lightsft.files import write_json
from lightsft.low_rank import rows_in_tile, tiles
from lightsft.row_changes import RowChange, as_matrix

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # what can be computed with; anything else is copied
NAMES = {dtype: name for name, dtype in TYPES.items()}
BLOCK = 2**20  # bytes that a thread reads at once
COPY = 2**26  # bytes that the kernel is asked to copy at once
THREADS = 4
MEASURED = 16  # tiles of a matrix, spread over it, on which the rounding is measured; all of one that has fewer
Report = Callable[[int], object]  # is told how many bytes more are written


class Lost:
    """What was changed of a tensor, and what rounding to the stored type loses of that: on MEASURED tiles or more."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, float, float]] = []  # (values, squares of delta, of error), as threads finish them

    def norms(self, values: int) -> tuple[float, float]:
        """(||delta||, ||error||) of all the tensor's values, from those that were measured."""
        counts, delta, error = zip(*self.parts, strict=True) if self.parts else ((1,), (0.0,), (0.0,))
        share = values / sum(counts)
        return math.sqrt(share * math.fsum(delta)), math.sqrt(share * math.fsum(error))


@dataclass(frozen=True)
class Written:
    """A tensor of the new checkpoint: its place in its file, and where it comes from."""

    source: StoredTensor
    dtype: str
    start: int
    stop: int
    change: RowChange | None = None
    lost: Lost = field(default_factory=Lost)


@dataclass(frozen=True)
class WrittenFile:
    """A file of the new checkpoint."""

    name: str
    header: bytes
    tensors: tuple[Written, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


def plan(
    checkpoint: Checkpoint,
    changes: Mapping[str, RowChange],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> tuple[WrittenFile, ...]:
    """The files to write: those of the base, or with another type or size of shards other ones."""
    if dtype is None and max_shard_size is None:
        return tuple(_like(shard, changes) for shard in checkpoint.shards)
    tensors = [tensor for shard in checkpoint.shards for tensor in shard.tensors]
    groups = _sharded(tensors, dtype, max_shard_size or checkpoint.size * 8)
    return tuple(
        _new_file(_shard_name(number, len(groups)), group, changes, dtype) for number, group in enumerate(groups)
    )


def _like(shard: Shard, changes: Mapping[str, RowChange]) -> WrittenFile:
    """The same header, the same places."""
    with shard.path.open("rb") as file:
        header = file.read(shard.header)
    tensors = (Written(t, t.dtype, t.start, t.stop, changes.get(t.name)) for t in shard.tensors)
    return WrittenFile(shard.path.name, header, tuple(tensors))


def _sharded(tensors: Sequence[StoredTensor], dtype: torch.dtype | None, most: int) -> list[list[StoredTensor]]:
    """In order, as many to a file as fit; one that is larger has a file of its own."""
    groups: list[list[StoredTensor]] = [[]]
    held = 0
    for tensor in tensors:
        size = _size_as(tensor, dtype)
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
    return groups


def _type_as(tensor: StoredTensor, dtype: torch.dtype | None) -> str:
    return NAMES[dtype] if dtype is not None and tensor.dtype in TYPES else tensor.dtype


def _size_as(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    kind = _type_as(tensor, dtype)
    return tensor.size if kind == tensor.dtype else math.prod(tensor.shape) * TYPES[kind].itemsize


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _new_file(
    name: str, tensors: Sequence[StoredTensor], changes: Mapping[str, RowChange], dtype: torch.dtype | None
) -> WrittenFile:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    for tensor in tensors:
        start, end = end, end + _size_as(tensor, dtype)
        kind = _type_as(tensor, dtype)
        entries[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        places.append((tensor, kind, start, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    written = (Written(t, kind, len(header) + a, len(header) + b, changes.get(t.name)) for t, kind, a, b in places)
    return WrittenFile(name, header, tuple(written))


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
                sources = {
                    path: stack.enter_context(_opened(path, os.O_RDONLY))
                    for path in dict.fromkeys(tensor.source.file for tensor in file.tensors)
                }
                _write_pieces(file, sources, out, pool, 2 * threads, tell)
                os.fsync(out)
    if len(files) > 1:
        write_json(folder / INDEX_FILE, _index(checkpoint, files))


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


def _index(checkpoint: Checkpoint, files: Sequence[WrittenFile]) -> dict[str, Any]:
    metadata = dict((checkpoint.index or {}).get("metadata") or {})
    metadata["total_size"] = sum(tensor.stop - tensor.start for file in files for tensor in file.tensors)
    names = {tensor.source.name: file.name for file in files for tensor in file.tensors}
    return {"metadata": metadata, "weight_map": names}


# ---- pieces of a file: read and changed by several threads, written by one, since a file has one lock


def _write_pieces(
    file: WrittenFile, sources: Mapping[Path, int], out: int, pool: Executor, most: int, report: Report
) -> None:
    waiting: deque[tuple[_Edit, Future[Tensor], _Space]] = deque()
    free = [_Space() for _ in range(most)]
    for piece in _pieces(file):
        if isinstance(piece, _Copy):
            _copy_bytes(sources[piece.source], out, piece.start, piece.stop, piece.start + piece.shift)
            _start_writing(out, piece.start + piece.shift, piece.stop - piece.start)
            report(piece.stop - piece.start)
            continue
        if not free:
            free.append(_write_next(waiting, out, report))
        space = free.pop()
        waiting.append((piece, pool.submit(piece.changed, sources[piece.tensor.source.file], space), space))
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


def _pieces(file: WrittenFile) -> Iterator[_Copy | _Edit]:
    """In order; neighbours that are copied are copied together."""
    run: list[Written] = []
    for tensor in file.tensors:
        copied = tensor.change is None and tensor.dtype == tensor.source.dtype
        if run and not (copied and _follows(run[-1], tensor)):
            yield from _copies(run)
            run = []
        if copied:
            run.append(tensor)
        else:
            yield from _edits(tensor)
    yield from _copies(run)


def _follows(one: Written, other: Written) -> bool:
    return (one.source.file, one.source.stop, one.stop) == (other.source.file, other.source.start, other.start)


def _copies(run: Sequence[Written]) -> Iterator[_Copy]:
    if not run:
        return
    source, start, shift = run[0].source.file, run[0].source.start, run[0].start - run[0].source.start
    stop = run[-1].source.stop
    for begin in range(start, stop, COPY):
        yield _Copy(source, begin, min(begin + COPY, stop), shift)


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


def _edits(tensor: Written) -> Iterator[_Edit]:
    """Blocks of whole tiles of each matrix."""
    source = TYPES[tensor.source.dtype]
    changes: Sequence[RowChange | None] = [None] if tensor.change is None else tensor.change.matrices()
    rows, columns = _shape(tensor)
    step = rows_in_tile(columns)
    block = step * max(1, BLOCK // max(1, step * columns * source.itemsize))
    for number, change in enumerate(changes):
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            yield _Edit(tensor, change, number * rows, slice(start, stop), columns)


def _shape(tensor: Written) -> tuple[int, int]:
    """(rows, columns) of each of its matrices."""
    if tensor.change is not None:
        rows, columns = tensor.change.shape[-2:]
        return rows, columns
    return as_matrix(tensor.source.shape)


@dataclass(frozen=True)
class _Edit:
    """Rows of one matrix of a tensor; those of the tensor itself are counted from `first`."""

    tensor: Written
    change: RowChange | None
    first: int
    rows: slice
    columns: int

    @property
    def place(self) -> int:
        """The byte of the new file at which it begins."""
        return self.tensor.start + self._offset * TYPES[self.tensor.dtype].itemsize

    @property
    def _offset(self) -> int:
        return int((self.first + self.rows.start) * self.columns)

    def changed(self, descriptor: int, space: _Space) -> Tensor:
        """The new values, of the base's in an open file."""
        source, target = TYPES[self.tensor.source.dtype], TYPES[self.tensor.dtype]
        count = self.rows.stop - self.rows.start
        before, after = space.of(count, self.columns, source, target)
        _read_all(descriptor, before, self.tensor.source.start + self._offset * source.itemsize)
        for part in tiles(count, self.columns):
            rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
            changed = before[part] if self.change is None else self.change.change(before[part], rows)
            if self.change is not None and self._is_measured(rows):
                self._measure(before[part], changed, changed.to(target))
            after[part] = changed
        return after

    def _is_measured(self, rows: slice) -> bool:
        size = rows_in_tile(self.columns)
        every = max(1, _shape(self.tensor)[0] // (size * MEASURED))
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
