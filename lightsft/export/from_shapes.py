"""The changes that an adapter folder makes to stored tensors, found with a model that has shapes and no values.

The strategy is placed on it as on any other, and given its saved tensors; each primitive then says what it makes of
which weight, by rows. The names that tensors have in the files are those that transformers gives them when it loads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lightsft import artifact
from lightsft.adapter_files import read_peft_settings, read_settings, read_tensors
from lightsft.backbone import Backbone, auto_class, label_options
from lightsft.errors import LightsftError
from lightsft.export.checkpoint_files import Checkpoint, StoredTensor
from lightsft.export.companions import differences
from lightsft.export.layout import Entry
from lightsft.export.stored_names import Places, find_places
from lightsft.finite import is_finite
from lightsft.injection import Injection
from lightsft.low_rank import LowRank
from lightsft.meta import weightless
from lightsft.primitives import Part, PlacedPart
from lightsft.quiet import quiet
from lightsft.row_changes import RowChange, Rows, Values, as_matrix

logger = logging.getLogger(__name__)


def made_by_shapes(adapter: Path, checkpoint: Checkpoint) -> tuple[dict[str, Entry], dict[str, Any]] | None:
    """The new checkpoint's tensors, and what its config.json says otherwise; None where the model in memory is needed.

    That is where a change is not one by rows, or a tensor is stored in a way that is not understood.
    """
    before = AutoConfig.from_pretrained(checkpoint.folder).to_dict()
    found = _placed(adapter, checkpoint, before["architectures"] or [])
    if found is None or not found[0].mergeable:
        return None
    injection, places = found
    changes = _changes(injection)
    made = None if changes is None else _made(changes, _copies(injection), places, checkpoint)
    if made is None:
        return None
    after = injection.model.config.to_dict() | {"architectures": [type(injection.model).__name__]}
    return made, differences(before, after)


def _made(
    changes: Mapping[str, RowChange], copies: Mapping[str, str], places: Places, checkpoint: Checkpoint
) -> dict[str, Entry] | None:
    """Every tensor, changed or not, under the name that the model's class stores it by."""
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
    kept = (t for shard in checkpoint.shards for t in shard.tensors if t.name in places.names)
    own = {places.names[t.name]: Entry.of(t, by_stored.get(t.name), places.names[t.name]) for t in kept}
    return own | others


def _copies(injection: Injection) -> dict[str, str]:
    """Parameters that start as copies of others, and which."""
    return {name: other for primitive in injection.primitives for name, other in primitive.copies().items()}


# ---- the model and what is placed on it


def _placed(adapter: Path, checkpoint: Checkpoint, architectures: Sequence[str]) -> tuple[Injection, Places] | None:
    """The strategy with its saved tensors on a model without values, and where that is stored; None if it does not fit.

    Whatever is wrong with the folder is found again, and said, where it is placed on the model in memory.
    """
    tensors = read_tensors(adapter)
    try:
        wanted = artifact.what_to_load(adapter, read_settings(adapter) or {}, read_peft_settings(adapter) or {})
        kind = wanted.get("kind") or auto_class(wanted["task"])
        with quiet(), weightless():
            config = AutoConfig.from_pretrained(checkpoint.folder, **label_options(wanted.get("labels")))
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
            model.tie_weights()
            places = find_places(model, checkpoint, other_class=type(model).__name__ not in architectures)
            if places is None:
                return None
            injection, tensors = artifact.placed(adapter, Backbone(model, fresh=sorted(places.missing)), tensors)
            buffers = _buffers(injection)
        _give_memory(injection, buffers)
        injection.load_tensors(tensors, origin=str(adapter))
    except (LightsftError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("%s needs the weights to be placed (%s): it is merged in memory", adapter, error)
        return None
    return injection, places


def _parts(injection: Injection) -> Iterator[nn.Module]:
    yield from (primitive.part for primitive in injection.primitives if isinstance(primitive, PlacedPart))
    yield from (p.part for p in injection.primitives if not isinstance(p, PlacedPart) and hasattr(p, "part"))


def _buffers(injection: Injection) -> dict[int, Tensor]:
    """The values of the parts' buffers that are known without those of a weight: which rows, which mask."""
    found = {}
    for part in _parts(injection):
        for buffer in part.buffers():
            value = buffer.cpu()
            if not value.is_meta:
                found[id(buffer)] = value
    return found


def _give_memory(injection: Injection, buffers: Mapping[int, Tensor]) -> None:
    """Parameters and buffers of the parts, off the meta device."""
    for part in _parts(injection):
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    empty = _nothing(parameter)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    known = buffers.get(id(buffer))
                    module._buffers[name] = _nothing(buffer) if known is None else known
        if isinstance(part, Part):
            part.make_again()


def _nothing(tensor: Tensor) -> Tensor:
    """Values that cannot be mistaken for some; what is trained is in fp32."""
    if tensor.is_floating_point():
        return torch.full(tensor.shape, math.nan)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


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
