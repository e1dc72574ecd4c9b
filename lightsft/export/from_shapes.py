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
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lightsft import artifact
from lightsft.adapter_files import read_peft_settings, read_settings, read_tensors
from lightsft.backbone import Backbone, auto_class
from lightsft.errors import LightsftError
from lightsft.export.checkpoint_files import Checkpoint, StoredTensor
from lightsft.finite import is_finite
from lightsft.injection import Injection
from lightsft.low_rank import LowRank
from lightsft.meta import weightless
from lightsft.primitives import Part, PlacedPart
from lightsft.quiet import quiet
from lightsft.row_changes import RowChange, as_matrix

logger = logging.getLogger(__name__)


def changes_by_shapes(adapter: Path, checkpoint: Checkpoint) -> dict[str, RowChange] | None:
    """Its change of each stored tensor, by name; None where the model in memory is needed.

    That is where files and model do not hold the same tensors (a new head), a table grows, a weight is untied, or a
    change is not one by rows.
    """
    injection = _placed(adapter, checkpoint.folder)
    if injection is None or not injection.mergeable:
        return None
    changes = _changes(injection)
    stored = _stored(injection.model, checkpoint)
    if changes is None or stored is None:
        return None
    found: dict[str, RowChange] = {}
    for name, change in changes.items():
        pieces = _pieces(change, stored.get(name, ()))
        if pieces is None or found.keys() & pieces.keys():
            return None
        found |= pieces
    return found


# ---- the model and what is placed on it


def _placed(adapter: Path, folder: Path) -> Injection | None:
    """The strategy with its saved tensors on a model without values; None if it does not go on one.

    Whatever is wrong with the folder is found again, and said, where it is placed on the model in memory.
    """
    tensors = read_tensors(adapter)
    wanted = artifact.what_to_load(adapter, read_settings(adapter) or {}, read_peft_settings(adapter) or {})
    labels = wanted.get("labels")
    kind = wanted.get("kind") or auto_class(wanted["task"])
    try:
        with quiet(), weightless():
            config = AutoConfig.from_pretrained(folder, **({"num_labels": len(labels)} if labels else {}))
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
            model.tie_weights()
            if type(model).__name__ not in (config.architectures or []):
                return None
            backbone = Backbone(model)
            injection, tensors = artifact.placed(adapter, backbone, tensors)
            buffers = _buffers(injection)
        _give_memory(injection, buffers)
        injection.load_tensors(tensors, origin=str(adapter))
    except (LightsftError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("%s needs the weights to be placed (%s): it is merged in memory", adapter, error)
        return None
    return injection


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


# ---- where a parameter is stored


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Sequence[StoredTensor]] | None:
    """The tensors that each parameter is loaded from, by every name of it; None if some have no counterpart."""
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own: dict[str, Any] = dict(model.state_dict())
    found: dict[str, list[tuple[int, StoredTensor]]] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own or (pattern is not None and not _stacks(by_pattern[pattern])):
            return None
        place = by_pattern[pattern].source_patterns.index(pattern) if pattern is not None else 0
        found.setdefault(name, []).append((place, checkpoint.tensors[key]))
    names = {id(tensor): [] for tensor in _named(model).values()}  # type: dict[int, list[str]]
    for name, tensor in _named(model).items():
        names[id(tensor)].append(name)
    result: dict[str, Sequence[StoredTensor]] = {}
    for group in names.values():
        held = [name for name in group if name in found]
        persistent = any(name in own for name in group)
        if len(held) > 1 or (persistent and not held):
            return None
        for name in group if held else ():
            result[name] = [tensor for _, tensor in sorted(found[held[0]], key=lambda pair: pair[0])]
    return result


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name, without what strategies have placed."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if "lightsft" not in name}


def _stacks(converter: WeightConverter) -> bool:
    """Whether it makes expert tensors of matrices, one for each expert, or of several side by side along their rows."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) and not _is_one_file(converter)


def _is_one_file(converter: WeightConverter) -> bool:
    return len(converter.target_patterns) > 1


def _pieces(change: RowChange, stored: Sequence[StoredTensor]) -> dict[str, RowChange] | None:
    """The change of each of the tensors that a parameter is loaded from; None if it cannot be taken apart."""
    if len(stored) == 1 and as_matrix(stored[0].shape)[0] == change.shape[0]:
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
