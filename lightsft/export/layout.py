"""What a new checkpoint is made of: its tensors, each from which stored one and by which change, and their files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightsft.export.checkpoint_files import SINGLE_FILE, Checkpoint, Shard, StoredTensor
from lightsft.row_changes import RowChange

if TYPE_CHECKING:
    from lightsft.export.recoding import Recoding

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # what can be computed with; anything else is copied
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of the new checkpoint, and what it is made of: a stored tensor (None: the base has none), a change.

    With more rows than the stored one, its change gives those too. With a `recoding` what is changed is not the
    stored matrix but what its codes stand for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor | None
    change: RowChange | None = None
    recoding: Recoding | None = None

    @classmethod
    def of(
        cls,
        source: StoredTensor,
        change: RowChange | None = None,
        name: str | None = None,
        recoding: Recoding | None = None,
    ) -> Entry:
        """A stored tensor as it is or changed, under its own name or another."""
        shape = source.shape
        if change is not None and len(change.shape) == 2 and shape:
            shape = (change.shape[0], *shape[1:])
        return cls(name or source.name, source.dtype, shape, source, change, recoding)

    @property
    def copied(self) -> bool:
        """Whether it holds the stored values."""
        return self.change is None and self.recoding is None

    @property
    def grows(self) -> bool:
        """Whether it has rows that are not stored."""
        return self.source is None or self.shape != self.source.shape

    def type_as(self, dtype: torch.dtype | None) -> str:
        """What it is stored as, where the checkpoint is to be in this type."""
        return NAMES[dtype] if dtype is not None and self.dtype in TYPES else self.dtype

    def size_as(self, dtype: torch.dtype | None) -> int:
        """In bytes."""
        kind = self.type_as(dtype)
        if kind not in TYPES:
            assert self.source is not None
            return self.source.size
        return math.prod(self.shape) * TYPES[kind].itemsize


def entries(checkpoint: Checkpoint, changes: Mapping[str, RowChange]) -> dict[str, Entry]:
    """Those of a checkpoint with the same tensors, of which some are changed."""
    return {name: Entry.of(tensor, changes.get(name)) for name, tensor in checkpoint.tensors.items()}


class Made(NamedTuple):
    """The tensors of a new checkpoint, what config.json says otherwise than the base's, a tokenizer if another."""

    entries: Mapping[str, Entry]
    settings: Mapping[str, Any]
    tokenizer: Any = None


class Lost:
    """What was changed of a tensor, and what rounding to the stored type loses of that, on the tiles measured."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, float, float]] = []  # (values, squares of delta, of error), as threads finish them

    def norms(self, values: int) -> tuple[float, float]:
        """(||delta||, ||error||) of all the tensor's values, from those that were measured."""
        counts, delta, error = zip(*self.parts, strict=True) if self.parts else ((1,), (0.0,), (0.0,))
        share = values / sum(counts)
        return math.sqrt(share * math.fsum(delta)), math.sqrt(share * math.fsum(error))


@dataclass(frozen=True)
class Written:
    """An entry and its place in its file: bytes `start` to `stop`, of type `dtype`."""

    entry: Entry
    dtype: str
    start: int
    stop: int
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
    made: Mapping[str, Entry],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> tuple[WrittenFile, ...]:
    """The files to write: those of the base, or with other tensors, another type or size of shards new ones."""
    same = made.keys() == checkpoint.tensors.keys() and not any(entry.grows for entry in made.values())
    if same and dtype is None and max_shard_size is None:
        return tuple(_like(shard, made) for shard in checkpoint.shards)
    if max_shard_size is None:
        groups = _as_stored(checkpoint, made)
    else:
        groups = _sharded(list(made.values()), dtype, max_shard_size)
    return tuple(_new_file(_shard_name(number, len(groups)), group, dtype) for number, group in enumerate(groups))


def _like(shard: Shard, made: Mapping[str, Entry]) -> WrittenFile:
    """The same header, the same places."""
    with shard.path.open("rb") as file:
        header = file.read(shard.header)
    tensors = (Written(made[t.name], t.dtype, t.start, t.stop) for t in shard.tensors)
    return WrittenFile(shard.path.name, header, tuple(tensors))


def _as_stored(checkpoint: Checkpoint, made: Mapping[str, Entry]) -> list[list[Entry]]:
    """Together as in the base; what the base does not have comes last."""
    files = {shard.path: number for number, shard in enumerate(checkpoint.shards)}
    groups: list[list[Entry]] = [[] for _ in files]
    for entry in made.values():
        groups[-1 if entry.source is None else files[entry.source.file]].append(entry)
    return [group for group in groups if group]


def _sharded(made: Sequence[Entry], dtype: torch.dtype | None, most: int) -> list[list[Entry]]:
    """In order, as many to a file as fit; one that is larger has a file of its own."""
    groups: list[list[Entry]] = [[]]
    held = 0
    for entry in made:
        size = entry.size_as(dtype)
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    return groups


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _new_file(name: str, made: Sequence[Entry], dtype: torch.dtype | None) -> WrittenFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    for entry in made:
        start, end = end, end + entry.size_as(dtype)
        kind = entry.type_as(dtype)
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [start, end]}
        places.append((entry, kind, start, end))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text
    written = (Written(entry, kind, len(whole) + a, len(whole) + b) for entry, kind, a, b in places)
    return WrittenFile(name, whole, tuple(written))


def index_of(checkpoint: Checkpoint, files: Sequence[WrittenFile]) -> dict[str, Any]:
    """The index of several files."""
    metadata = dict((checkpoint.index or {}).get("metadata") or {})
    metadata["total_size"] = sum(tensor.stop - tensor.start for file in files for tensor in file.tensors)
    return {"metadata": metadata, "weight_map": {t.entry.name: file.name for file in files for t in file.tensors}}
