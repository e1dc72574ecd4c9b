"""The changes that an adapter folder makes to stored tensors, found with a model that has shapes and no values.

The strategy is placed on it as on any other, and given its saved tensors; each primitive then says what it makes of
which weight, by rows. The names that tensors have in the files are those that transformers gives them when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from lightsft.export.checkpoint_files import Checkpoint, StoredTensor
from lightsft.export.companions import differences
from lightsft.export.layout import Entry, Made
from lightsft.export.mergeable import require_mergeable
from lightsft.export.placing import Placed, placed_without_values
from lightsft.finite import is_finite
from lightsft.injection import Injection
from lightsft.low_rank import LowRank
from lightsft.row_changes import RowChange, Rows, Values, as_matrix


def made_by_shapes(adapter: Path, checkpoint: Checkpoint) -> Made | None:
    """What an adapter folder makes of a checkpoint; None where the model in memory is needed.

    That is where a change is not one by rows, or a tensor is stored in a way that is not understood. Raises MergeError
    for a strategy that no weight can express.
    """
    before = AutoConfig.from_pretrained(checkpoint.folder).to_dict()
    if "quantization_config" in before:
        return None
    found = placed_without_values(adapter, checkpoint, before["architectures"] or [])
    if found is None:
        return None
    injection = found.injection
    require_mergeable(injection, adapter)
    changes = _changes(injection)
    made = None if changes is None else _made(changes, found, checkpoint)
    if made is None:
        return None
    after = injection.model.config.to_dict() | {"architectures": [type(injection.model).__name__]}
    return Made(made, differences(before, after), found.tokenizer)


def _made(changes: Mapping[str, RowChange], placed: Placed, checkpoint: Checkpoint) -> dict[str, Entry] | None:
    """Every tensor, changed or not, under the name that the model's class stores it by."""
    places, copies = placed.places, _copies(placed.injection)
    by_stored: dict[str, RowChange] = {}
    others: dict[str, Entry] = {}
    for name, change in changes.items():
        stored = places.of.get(copies.get(name, name), ())
        if not stored:
            if not isinstance(change, Values):
                return None
            others[name] = Entry(name, places.dtype, tuple(change.values.shape), None, change)
            continue
        pieces = _pieces(change, stored)
        if pieces is None or (name in copies and len(pieces) > 1) or by_stored.keys() & pieces.keys():
            return None
        if name in copies:
            others[name] = Entry.of(stored[0], change, name)
        else:
            by_stored |= pieces
    for name in copies.keys() - changes.keys():
        others[name] = Entry.of(places.of[copies[name]][0], None, name)
    if places.missing - others.keys():
        return None
    recoded = {places.of[name][0].name: recoding for name, recoding in placed.recodings.items()}
    own = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name in places.names:
            name = places.names[tensor.name]
            own[name] = Entry.of(tensor, by_stored.get(tensor.name), name, recoded.get(tensor.name))
    return own | others


def _copies(injection: Injection) -> dict[str, str]:
    """Parameters that start as copies of others, and which."""
    return {name: other for primitive in injection.primitives for name, other in primitive.copies().items()}


def _has_values(change: RowChange) -> bool:
    tensors = (value for value in vars(change).values() if isinstance(value, Tensor))
    return all(map(is_finite, tensors))


def _changes(injection: Injection) -> dict[str, RowChange] | None:
    """By the parameters' names; None if some primitive has none by rows, or two change one weight."""
    found: dict[str, RowChange] = {}
    with torch.no_grad():
        for primitive in injection.primitives:
            changes = primitive.row_changes()
            if changes is None or found.keys() & changes.keys() or not all(map(_has_values, changes.values())):
                return None
            found |= changes
    return found


def _pieces(change: RowChange, stored: Sequence[StoredTensor]) -> dict[str, RowChange] | None:
    """The change of each of the tensors that a parameter is loaded from; None if it cannot be taken apart."""
    if len(stored) == 1 and _is_of(change, stored[0]):
        return {stored[0].name: change}
    matrices = change.matrices()
    if not isinstance(change, LowRank) or len(matrices) < 2 or len(stored) % len(matrices):
        return None
    found: dict[str, RowChange] = {}
    first = 0
    for start in range(0, len(stored), len(matrices)):  # one kind of matrix of every expert after the other
        kind = stored[start : start + len(matrices)]
        rows = slice(first, first + kind[0].shape[0])
        for matrix, tensor in zip(matrices, kind, strict=True):
            assert isinstance(matrix, LowRank)
            magnitude = None if matrix.magnitude is None else matrix.magnitude[rows]
            piece = replace(matrix, b=matrix.b[rows], magnitude=magnitude)
            if piece.shape != tensor.shape:
                return None
            found[tensor.name] = piece
        first = rows.stop
    return found if first == change.shape[-2] else None


def _is_of(change: RowChange, stored: StoredTensor) -> bool:
    """Whether it changes the tensor as it is stored, or gives it more rows."""
    rows = as_matrix(stored.shape)[0]
    return change.shape[0] == rows or (isinstance(change, Rows) and change.shape[0] > rows)
