"""Where a checkpoint stores what a model loads: for each parameter the tensors it is made of, and their names.

The names that tensors have in the files are those that transformers itself gives them when it loads: renamed, under
the base model's prefix or without it, and for experts several of them made into one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lightsft.export.checkpoint_files import Checkpoint, StoredTensor
from lightsft.export.layout import NAMES, TYPES


@dataclass(frozen=True)
class Places:
    """Where parameters come from, by every name of each, and what becomes of the stored names.

    `names`: of each stored tensor that the model loads, its name in a checkpoint of the model's class. `missing`:
    parameters that are not stored. `dtype`: what the model keeps its weights in.
    """

    of: Mapping[str, Sequence[StoredTensor]]
    names: Mapping[str, str]
    missing: frozenset[str]
    dtype: str


def find_places(model: PreTrainedModel, checkpoint: Checkpoint, *, other_class: bool = False) -> Places | None:
    """Where a model loads its parameters from; None where files and model cannot be brought together.

    Of a checkpoint that another class wrote, tensors may be left over.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own: dict[str, Any] = {name: tensor for name, tensor in model.state_dict().items() if "lightsft" not in name}
    found: dict[str, list[tuple[int, StoredTensor]]] = {}
    names: dict[str, str] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own:
            if other_class:
                continue
            return None
        if pattern is None and checkpoint.tensors[key].shape != own[name].shape:
            continue  # of a head with another number of labels: given anew
        if pattern is not None and not _stacks(by_pattern[pattern]):
            return None
        place = by_pattern[pattern].source_patterns.index(pattern) if pattern is not None else 0
        found.setdefault(name, []).append((place, checkpoint.tensors[key]))
        names[key] = name
    by_name = _by_every_name(model, own, found)
    written = _written_names(names, other_class=other_class)
    if by_name is None or written is None:
        return None
    return Places(by_name[0], written, by_name[1], _type_of(model, checkpoint))


def _by_every_name(
    model: nn.Module, own: Mapping[str, Any], found: Mapping[str, Sequence[tuple[int, StoredTensor]]]
) -> tuple[dict[str, list[StoredTensor]], frozenset[str]] | None:
    """The stored tensors of each parameter by all its names, and the parameters without any; None if two are stored."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _named(model).items():
        groups.setdefault(id(tensor), []).append(name)
    result: dict[str, list[StoredTensor]] = {}
    missing = set()
    for group in groups.values():
        held = [name for name in group if name in found]
        if len(held) > 1:
            return None
        if not held:
            missing |= {name for name in group if name in own}.intersection(group[:1])
        for name in group if held else ():
            result[name] = [tensor for _, tensor in sorted(found[held[0]], key=lambda pair: pair[0])]
    return result, frozenset(missing)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name, without what strategies have placed."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if "lightsft" not in name}


def _written_names(names: Mapping[str, str], *, other_class: bool) -> dict[str, str] | None:
    """Each stored name, as the model's class stores it; None where that is not a matter of a prefix.

    One that transformers renames keeps the stored name, which is what a checkpoint of its class has too.
    """
    if not other_class:
        return {key: key for key in names}
    prefixes = {_prefix(key, name) for key, name in names.items()} - {None}
    renamed = [key for key, name in names.items() if _prefix(key, name) is None]
    if renamed and prefixes != {("", "")}:
        return None
    return {key: key if key in renamed else name for key, name in names.items()}


def _prefix(key: str, name: str) -> tuple[str, str] | None:
    """What one begins with and the other does not; None if they differ otherwise."""
    if name.endswith(key):
        return "", name.removesuffix(key)
    return (key.removesuffix(name), "") if key.endswith(name) else None


def _type_of(model: PreTrainedModel, checkpoint: Checkpoint) -> str:
    """What transformers loads it in, with the type that the checkpoint says."""
    stated = getattr(model.config, "dtype", None)
    stored = (tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in TYPES)
    return NAMES[stated] if stated in NAMES else next(stored, "F32")


def _stacks(converter: WeightConverter) -> bool:
    """Whether it makes expert tensors of matrices, one for each expert, or of several side by side along their rows."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) and not _is_one_file(converter)


def _is_one_file(converter: WeightConverter) -> bool:
    return len(converter.target_patterns) > 1
