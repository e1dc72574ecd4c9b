"""What a checkpoint's safetensors files hold, read from their headers alone, trusting nothing.

    file   = length (8 bytes, little endian) | header (JSON of that length) | data
    header = {name: {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__": {text: text}}

The tensors must cover the data without hole or overlap, each with prod(shape) x bits / 8 bytes. A folder holds
`model.safetensors`, or `model.safetensors.index.json` whose `weight_map` names the shard of every tensor; where both
are there, the single file counts, as it does for transformers. Links to files elsewhere are followed: the hub's cache
is made of them. Everything that is wrong with a folder is raised at once, as BackboneError.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from lightsft.errors import BackboneError, first_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_ELEMENTS = 2**63 - 1  # of a tensor in torch
_MOST_LINES = 12


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's type, shape and place: bytes `start` to `stop` of the file, counted from its beginning.

    `dtype` is safetensors' name ("BF16"), and `shape` counts values: an F4 tensor has two of them in each byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its data begins at byte `header`, its tensors are in order of position."""

    path: Path
    header: int
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.tensors[-1].stop if self.tensors else self.header


@dataclass(frozen=True)
class Checkpoint:
    """All weights of a folder; `index` is what the index file says, None for a single file."""

    folder: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """By name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a folder's safetensors hold; raise BackboneError with all that is wrong."""
    problems = _Problems()
    if _is_file(folder / SINGLE_FILE):
        index, names = None, [SINGLE_FILE]
    elif _is_file(folder / INDEX_FILE):
        index = _read_index(folder / INDEX_FILE, problems)
        problems.raise_any(folder)
        names = sorted(set(index["weight_map"].values()))
    else:
        raise _no_safetensors(folder)
    shards = {name: shard for name in names if (shard := _read_shard(folder / name, problems)) is not None}
    if index is not None:
        _compare(index["weight_map"], shards, problems)
    problems.raise_any(folder)
    return Checkpoint(folder, tuple(shards.values()), index)


def read_shard(path: Path) -> Shard:
    """What one safetensors file holds; raise BackboneError with all that is wrong."""
    problems = _Problems()
    shard = _read_shard(path, problems)
    problems.raise_any(path)
    assert shard is not None
    return shard


class _Refused(Exception):
    """One problem, in a line that names the file."""


class _Problems:
    """The first lines of what is wrong, and how many there are in all."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= _MOST_LINES:
            self.lines.append(line)

    def raise_any(self, path: Path) -> None:
        """Raise BackboneError if there are any."""
        if not self.count:
            return
        more = [f"and {self.count - _MOST_LINES:,} more"] if self.count > _MOST_LINES else []
        raise BackboneError(
            "\n  ".join([f"{path} cannot be read as safetensors:", *self.lines, *more]),
            expected="whole files as save_pretrained writes them",
            todo="copy or download what is named here again, or save the base anew; nothing was written",
        )


def _read_shard(path: Path, problems: _Problems) -> Shard | None:
    """None, and what is wrong, for a file that cannot be trusted."""
    before = problems.count
    try:
        text, file_size = _header_bytes(path)
        fields = _parse(text, f"{path.name}: its header")
    except _Refused as refused:
        problems.add(str(refused))
        return None
    header = _LENGTH_BYTES + len(text)
    metadata = fields.pop("__metadata__", {})
    if not _is_text_map(metadata):
        problems.add(f"{path.name}: its __metadata__ is {_shown(metadata)}, not a map of texts")
    tensors = []
    for name, entry in fields.items():
        try:
            tensors.append(_tensor(name, entry, path, header))
        except _Refused as refused:
            problems.add(f"{path.name}: tensor {_shown(name)} {refused}")
    if len(tensors) == len(fields):  # the place of a tensor that was refused would look like a hole
        tensors.sort(key=attrgetter("start", "stop"))
        _check_layout(tensors, path, header, file_size, problems)
    return Shard(path, header, metadata, tuple(tensors)) if problems.count == before else None


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON of a file's header, and the size of the file."""
    try:
        if not path.is_file():
            raise _Refused(f"{path.name}: " + ("is not a regular file" if path.exists() else "is missing"))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _LENGTH_BYTES:
                raise _Refused(f"{path.name}: has {size} bytes, too few for the length of a header")
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MOST_HEADER_BYTES:
                raise _Refused(f"{path.name}: its header claims {length:,} bytes, more than 100 MB: not safetensors")
            text = file.read(length)
    except OSError as error:
        raise _Refused(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise _Refused(f"{path.name}: is truncated: its header claims {length:,} bytes, {len(text):,} are there")
    return text, size


def _parse(text: bytes, what: str) -> dict[str, Any]:
    """The object that some JSON holds, in which no key may come twice."""
    repeated: list[str] = []

    def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            repeated.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return fields

    def no_number(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=keys_once, parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise _Refused(f"{what} is not UTF-8: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{what} is not JSON: {first_line(error)}") from error
    if not isinstance(parsed, dict):
        raise _Refused(f"{what} is {_shown(parsed)}, not an object of JSON")
    if repeated:
        raise _Refused(f"{what} has the key {_shown(repeated[0])} twice ({len(repeated):,} such keys)")
    return parsed


def _tensor(name: str, entry: Any, path: Path, header: int) -> StoredTensor:
    """The tensor that an entry of a header describes."""
    if not _is_text(name):
        raise _Refused("has a name that is not Unicode")
    if not isinstance(entry, dict):
        raise _Refused(f"is {_shown(entry)}, not an object with dtype, shape and data_offsets")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise _Refused(f"has no {' and no '.join(missing)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Refused(f"has the dtype {_shown(dtype)}, which safetensors does not have")
    if not _are_counts(shape):
        raise _Refused(f"has the shape {_shown(shape)}, not a list of whole numbers from 0 to 2^63 - 1")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Refused(f"has the data_offsets {_shown(offsets)}, not two positions [start, stop]")
    bits = _elements(shape) * BITS[dtype]
    if bits % 8:
        raise _Refused(f"of {dtype} and shape {_shown(shape)} takes {bits:,} bits, which are no whole bytes")
    start, stop = offsets
    if stop - start != bits // 8:
        raise _Refused(f"of {dtype} and shape {_shown(shape)} takes {bits // 8:,} bytes, but has {stop - start:,}")
    return StoredTensor(name, dtype, tuple(shape), path, header + start, header + stop)


def _elements(shape: Sequence[int]) -> int:
    """prod(shape); refuse one whose strides overflow in torch, even where another axis is empty."""
    product = 1
    for length in shape:
        product *= length or 1
        if product > _MOST_ELEMENTS:
            raise _Refused(f"has the shape {_shown(shape)}, of more than 2^63 - 1 values")
    return 0 if 0 in shape else product


def _check_layout(tensors: Sequence[StoredTensor], path: Path, header: int, size: int, problems: _Problems) -> None:
    """Whether tensors in order of position cover a file of `size` bytes from its header to its end, once."""
    before = problems.count
    position, last = header, ""
    for tensor in tensors:
        if tensor.start > position:
            problems.add(
                f"{path.name}: a hole of {tensor.start - position:,} bytes before tensor {_shown(tensor.name)}"
            )
        elif tensor.start < position:
            problems.add(f"{path.name}: tensors {_shown(last)} and {_shown(tensor.name)} overlap")
        if tensor.stop >= position:
            position, last = tensor.stop, tensor.name
    if position < size:
        problems.add(f"{path.name}: {size - position:,} bytes after the last tensor")
    outside = [tensor for tensor in tensors if tensor.stop > size]
    if outside and problems.count == before:
        problems.add(
            f"{path.name}: is truncated: its tensors end at byte {position:,}, the file at {size:,}; "
            f"{len(outside):,} of them lack bytes, the first is {_shown(outside[0].name)}"
        )
        return
    for tensor in outside:
        problems.add(
            f"{path.name}: tensor {_shown(tensor.name)} lies outside the data: "
            f"bytes {tensor.start:,} to {tensor.stop:,} of {size:,}"
        )


def _read_index(path: Path, problems: _Problems) -> dict[str, Any]:
    """The parsed index; whoever calls raises the problems before using it."""
    try:
        index = _parse(_index_bytes(path), path.name)
    except _Refused as refused:
        problems.add(str(refused))
        return {}
    weight_map = index.get("weight_map")
    if not _is_text_map(weight_map) or not weight_map:
        problems.add(f"{path.name}: its weight_map is {_shown(weight_map)}, not a map from tensors to files")
        return {}
    for file in sorted(set(weight_map.values())):
        if not _is_plain_name(file):
            problems.add(f"{path.name}: its weight_map names {_shown(file)}, not a file of this folder")
    return index


def _index_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_HEADER_BYTES + 1)
    except OSError as error:
        raise _Refused(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(text) > _MOST_HEADER_BYTES:
        raise _Refused(f"{path.name}: has more than 100 MB")
    return text


def _compare(weight_map: Mapping[str, str], shards: Mapping[str, Shard], problems: _Problems) -> None:
    """Whether every tensor lies in the shard that the index names, and nowhere else."""
    holders: dict[str, list[str]] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            holders.setdefault(tensor.name, []).append(file)
    for name, files in holders.items():
        if len(files) > 1:
            problems.add(f"tensor {_shown(name)} lies in {len(files)} shards: {' and '.join(files[:3])}")
        elif name not in weight_map:
            problems.add(f"{files[0]}: holds tensor {_shown(name)}, which the index does not list")
        elif weight_map[name] != files[0]:
            problems.add(f"{files[0]}: holds tensor {_shown(name)}, which the index assigns to {weight_map[name]}")
    for name, file in weight_map.items():
        if name not in holders and file in shards:
            problems.add(f"{file}: lacks tensor {_shown(name)}, which the index assigns to it")


def _no_safetensors(folder: Path) -> BackboneError:
    """For a folder with neither file, by what it holds instead."""
    expected = f"a folder with {SINGLE_FILE}, or {INDEX_FILE} and its shards"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return BackboneError(
            f"cannot list {folder}: {error.strerror}", expected=expected, todo="check the path of the base"
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in names:
            return BackboneError(
                f"{folder / name} is a folder, or a link to a file that is gone",
                expected=expected,
                todo="download the base again, links and what they point to",
            )
    if others := [name for name in names if name.startswith("pytorch_model") or name.endswith(".gguf")]:
        return BackboneError(
            f"{folder} holds no safetensors, but {_some(others)}",
            expected=f"{expected}; a base in another format is merged in memory",
            todo="load it with lightsft.merge(..., streaming=False)",
        )
    if pieces := [name for name in names if name.endswith(".safetensors")]:
        return BackboneError(
            f"{folder} holds {_some(pieces)}, but no {SINGLE_FILE} and no {INDEX_FILE}",
            expected=expected,
            todo=f"copy {INDEX_FILE} beside its shards, or rename a single file to {SINGLE_FILE}",
        )
    return BackboneError(f"{folder} holds no safetensors", expected=expected, todo="check the path of the base")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be entered; listing it says why
        return False


def _is_plain_name(name: str) -> bool:
    """Of a file right in the folder, on any system: no separator, drive or step up."""
    return PureWindowsPath(name).name == name and name not in ("", "..") and name.isprintable()


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON can escape half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and _is_text(text) for key, text in value.items())


def _are_counts(value: Any) -> bool:
    """A list of whole numbers that fit torch's int64; `true` is none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in value)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shown(value: Any) -> str:
    """A value of a file in a short, printable line."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxlong = 2, 8, 3, 100, 40
    return short.repr(value)
