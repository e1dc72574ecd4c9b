"""Write a changed checkpoint from disk to disk: shard by shard, in tiles, without a model.

Bytes that do not change are copied by the kernel; of a tensor that changes some rows at a time are read, changed in
fp32, rounded once and written. Memory does not depend on the size of the checkpoint. The base is only read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightsft.export.checkpoint_files import INDEX_FILE, SINGLE_FILE, Checkpoint, Shard, StoredTensor
from lightsft.files import write_json
from lightsft.low_rank import tiles

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # what can be computed with; anything else is copied
NAMES = {dtype: name for name, dtype in TYPES.items()}
BLOCK = 2**22  # bytes that a thread reads at once
COPY = 2**26  # bytes that the kernel is asked to copy at once
THREADS = 4
Report = Callable[[int], object]  # is told how many bytes more are written


class Change(Protocol):
    """What becomes of one tensor, seen as one matrix or several."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns) of the matrix, or with the number of matrices before."""
        ...

    def matrices(self) -> Sequence[Change]:
        """One for each matrix."""
        ...

    def change(self, weight: Tensor, rows: slice) -> Tensor:
        """The new values in fp32 of these rows of one matrix, which are given as stored."""
        ...


class Lost:
    """Squares summed over a tensor: of what was changed, and of what rounding to the stored type loses of it."""

    def __init__(self) -> None:
        self.parts: list[tuple[float, float]] = []  # of each piece, in the order in which threads finish them

    @property
    def norms(self) -> tuple[float, float]:
        """(||delta||, ||error||)."""
        delta, error = zip(*self.parts, strict=True) if self.parts else ((), ())
        return math.sqrt(math.fsum(delta)), math.sqrt(math.fsum(error))


@dataclass(frozen=True)
class Written:
    """A tensor of the new checkpoint: its place in its file, and where it comes from."""

    source: StoredTensor
    dtype: str
    start: int
    stop: int
    change: Change | None = None
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
    changes: Mapping[str, Change],
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


def _like(shard: Shard, changes: Mapping[str, Change]) -> WrittenFile:
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
    name: str, tensors: Sequence[StoredTensor], changes: Mapping[str, Change], dtype: torch.dtype | None
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
    with _one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for file in files:
            with ExitStack() as stack:
                out = stack.enter_context(_opened(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL))
                os.truncate(out, file.size)
                _write_all(out, file.header, 0)
                sources = {
                    path: stack.enter_context(_opened(path, os.O_RDONLY))
                    for path in dict.fromkeys(tensor.source.file for tensor in file.tensors)
                }
                jobs = [pool.submit(job, sources, out, tell) for job in _jobs(file)]
                for done in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    done.result()
                os.fsync(out)
    if len(files) > 1:
        write_json(folder / INDEX_FILE, _index(checkpoint, files))


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Within it torch computes with one thread; the threads are ours, each with a piece of the file."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(THREADS, os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)


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


# ---- pieces of a file, each for a thread

Job = Callable[[Mapping[Path, int], int, Report], None]


def _jobs(file: WrittenFile) -> Iterator[Job]:
    """Neighbours that are copied are copied together."""
    run: list[Written] = []
    for tensor in file.tensors:
        if tensor.change is None and tensor.dtype == tensor.source.dtype:
            if run and not _follows(run[-1], tensor):
                yield from _copies(run)
                run = []
            run.append(tensor)
        else:
            yield from _copies(run)
            run = []
            yield from _edits(tensor)
    yield from _copies(run)


def _follows(one: Written, other: Written) -> bool:
    return (one.source.file, one.source.stop, one.stop) == (other.source.file, other.source.start, other.start)


def _copies(run: Sequence[Written]) -> Iterator[Job]:
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

    def __call__(self, sources: Mapping[Path, int], out: int, report: Report) -> None:
        copy_bytes(sources[self.source], out, self.start, self.stop, self.start + self.shift)
        report(self.stop - self.start)


def copy_bytes(source: int, out: int, start: int, stop: int, place: int) -> None:
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


def _edits(tensor: Written) -> Iterator[Job]:
    """Blocks of whole tiles of each matrix."""
    source = TYPES[tensor.source.dtype]
    changes: Sequence[Change | None] = [None] if tensor.change is None else tensor.change.matrices()
    rows, columns = _shape(tensor)
    step = next(tiles(rows, columns), slice(0, 1)).stop
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
    rows = tensor.source.shape[0] if tensor.source.shape else 1
    return rows, math.prod(tensor.source.shape) // max(1, rows)


@dataclass(frozen=True)
class _Edit:
    """Rows of one matrix of a tensor; those of the tensor itself are counted from `first`."""

    tensor: Written
    change: Change | None
    first: int
    rows: slice
    columns: int

    def __call__(self, sources: Mapping[Path, int], out: int, report: Report) -> None:
        source, target = TYPES[self.tensor.source.dtype], TYPES[self.tensor.dtype]
        count = self.rows.stop - self.rows.start
        before = torch.empty(count, self.columns, dtype=source)
        offset = (self.first + self.rows.start) * self.columns
        _read_all(sources[self.tensor.source.file], before, self.tensor.source.start + offset * source.itemsize)
        after = before if source == target else torch.empty(count, self.columns, dtype=target)
        delta = error = 0.0
        for part in tiles(count, self.columns):
            if self.change is None:
                after[part] = before[part].to(target)
                continue
            changed = self.change.change(before[part], slice(self.rows.start + part.start, self.rows.start + part.stop))
            stored = changed.to(target)
            delta += _square(changed - before[part])
            error += _square(stored.float().sub_(changed)) if target != torch.float32 else 0.0
            after[part] = stored
        self.tensor.lost.parts.append((delta, error))
        report(_write_all(out, _bytes(after), self.tensor.start + offset * target.itemsize))


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


def _write_all(descriptor: int, content: bytes | memoryview, place: int) -> int:
    view, size = memoryview(content), len(content)
    while view:
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count
    return size
