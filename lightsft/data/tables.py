"""Tables of typed columns: parquet and arrow files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightsft.data.parts import WHOLE, Numbered, Part, Parts
from lightsft.errors import DataError, first_line

ROWS = 1024  # at a time
BUFFER_BYTES = 2**20  # of each column of a parquet file


def parquet_parts(path: Path, encoding: str) -> Parts:
    """The rows of a parquet file."""
    size = path.stat().st_size
    return {WHOLE: Part(partial(_numbered, partial(_parquet_batches, path), size), size)}


def arrow_parts(path: Path, encoding: str) -> Parts:
    """The rows of an Arrow IPC file or stream (also under the name .feather, version 2)."""
    size = path.stat().st_size
    return {WHOLE: Part(partial(_numbered, partial(_arrow_batches, path), size), size)}


def _numbered(batches: Any, size: int) -> Iterator[Numbered]:
    number = 0
    for rows, share in batches():
        for row in rows:
            number += 1
            yield Numbered(number, row, position=int(share * size))


def _parquet_batches(path: Path) -> Iterator[tuple[list[dict[str, Any]], float]]:
    """Rows, and the share of the file that was read with them."""
    from pyarrow import parquet

    # By default all of the file's row groups are read ahead and held.
    with _whole(path, "a parquet file"), parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        read = 0
        for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
            read += batch.num_rows
            yield batch.to_pylist(), read / file.metadata.num_rows


def _arrow_batches(path: Path) -> Iterator[tuple[list[dict[str, Any]], float]]:
    from pyarrow import OSFile

    with _whole(path, "an Arrow IPC file or stream"), OSFile(str(path)) as file:
        for batch, share in _record_batches(file):
            for start in range(0, batch.num_rows, ROWS):
                yield batch.slice(start, ROWS).to_pylist(), share


def _record_batches(file: Any) -> Iterator[tuple[Any, float]]:
    from pyarrow import ipc

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index), (index + 1) / reader.num_record_batches
    else:
        for batch in ipc.open_stream(file):
            yield batch, file.tell() / file.size()


@contextmanager
def _whole(path: Path, kind: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {first_line(error)}", expected=kind) from error
