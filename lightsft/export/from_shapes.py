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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from lightsft import artifact
from lightsft.adapter_files import read_peft_settings, read_settings, read_tensors
from lightsft.backbone import Backbone, auto_class, label_options
from lightsft.errors import LightsftError
from lightsft.export.checkpoint_files import Checkpoint, StoredTensor
from lightsft.export.companions import differences
from lightsft.export.layout import NAMES, TYPES, Entry
from lightsft.export.recoding import Recoding
from lightsft.export.stored_names import Places, find_places
from lightsft.finite import is_finite
from lightsft.injection import Injection
from lightsft.low_rank import LowRank
from lightsft.meta import weightless
from lightsft.primitives import Part, PlacedPart
from lightsft.quantization import Quantization
from lightsft.quantizing import quantizable
from lightsft.quiet import quiet
from lightsft.row_changes import RowChange, Rows, Values, as_matrix

logger = logging.getLogger(__name__)


def made_by_shapes(adapter: Path, checkpoint: Checkpoint) -> tuple[dict[str, Entry], dict[str, Any]] | None:
    """The new checkpoint's tensors, and what its config.json says otherwise; None where the model in memory is needed.

    That is where a change is not one by rows, or a tensor is stored in a way that is not understood.
    """
    before = AutoConfig.from_pretrained(checkpoint.folder).to_dict()
    if "quantization_config" in before:
        return None
    found = _placed(adapter, checkpoint, before["architectures"] or [])
    if found is None or not found.injection.mergeable:
        return None
    injection = found.injection
    changes = _changes(injection)
    made = None if changes is None else _made(changes, found, checkpoint)
    if made is None:
        return None
    after = injection.model.config.to_dict() | {"architectures": [type(injection.model).__name__]}
    return made, differences(before, after)


def _made(changes: Mapping[str, RowChange], placed: _Placed, checkpoint: Checkpoint) -> dict[str, Entry] | None:
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


# ---- the model and what is placed on it


class _Placed(NamedTuple):
    """A strategy on a model without values, where that is stored, and the weights that it was given as codes."""

    injection: Injection
    places: Places
    recodings: Mapping[str, Recoding]


def _placed(adapter: Path, checkpoint: Checkpoint, architectures: Sequence[str]) -> _Placed | None:
    """The strategy with its saved tensors on such a model; None if it does not fit.

    Whatever is wrong with the folder is found again, and said, where it is placed on the model in memory.
    """
    tensors, settings = read_tensors(adapter), read_settings(adapter) or {}
    try:
        wanted = artifact.what_to_load(adapter, settings, read_peft_settings(adapter) or {})
        kind = wanted.get("kind") or auto_class(wanted["task"])
        with quiet(), weightless():
            config = AutoConfig.from_pretrained(checkpoint.folder, **label_options(wanted.get("labels")))
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
            model.tie_weights()
            places = find_places(model, checkpoint, other_class=type(model).__name__ not in architectures)
            if places is None:
                return None
            backbone = Backbone(model, fresh=sorted(places.missing))
            recodings = _recodings(settings.get("base", {}), backbone, places)
            if recodings is None:
                return None
            injection, tensors = artifact.placed(adapter, backbone, tensors)
            buffers = _buffers(injection)
        _give_memory(injection, buffers)
        injection.load_tensors(tensors, origin=str(adapter))
    except (LightsftError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("%s needs the weights to be placed (%s): it is merged in memory", adapter, error)
        return None
    return _Placed(injection, places, recodings)


def _recodings(base: Mapping[str, Any], backbone: Backbone, places: Places) -> dict[str, Recoding] | None:
    """How each weight was quantized that the strategy was trained beside; None where that cannot be done again.

    That is where the codes were made from another type than the stored one, or by another library.
    """
    if base.get("quantization") is None:
        return {}
    how = Quantization.parse(base["quantization"])
    layers = quantizable(backbone.model, backbone.anatomy)
    stored = {tensor.dtype for tensors in places.of.values() for tensor in tensors if tensor.dtype in TYPES}
    alone = all(len(places.of.get(f"{name}.weight", ())) == 1 for name in layers)
    if how is None or not alone or stored != {NAMES[getattr(torch, base["dtype"])]}:
        return None
    return {f"{name}.weight": Recoding(how, isinstance(backbone.module(name), Conv1D)) for name in layers}


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
