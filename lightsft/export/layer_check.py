"""A merged checkpoint against base + adapter, both run a layer at a time from disk: for those too large to load.

The model of base + adapter has shapes and no values: what a module reads is brought from the files when it runs, and
forgotten afterwards. The merged checkpoint is run by plain transformers, which leaves its weights on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightsft.errors import ConfigurationError, LightsftError, first_line
from lightsft.export.certificate import certify, logits_of, plain_logits
from lightsft.export.checkpoint_files import StoredTensor, read_checkpoint
from lightsft.export.from_disk import DiskMerge
from lightsft.export.inputs import inputs_to_compare
from lightsft.export.placing import Placed, placed_without_values
from lightsft.files import read_json
from lightsft.row_changes import Values
from lightsft.trace import nearest_called

CPU = torch.device("cpu")
BATCHES = 1  # of random tokens: each takes every layer from the disk
COMPARED = (
    "base + adapter, run a layer at a time from disk, with the merged checkpoint, run in the same way by transformers "
    "in a process where lightsft cannot be imported"
)


def check_by_layers(merge: DiskMerge, folder: Path) -> dict[str, Any]:
    """Logits of both on random tokens; `passed` by stated limits.

    Raises ConfigurationError where the model cannot be run so.
    """
    base = merge.checkpoint.folder
    if merge.adapter is None:
        raise _impossible("several adapters were merged: no single strategy is what that computes")
    placed = placed_without_values(
        merge.adapter, read_checkpoint(base), read_json(base / "config.json").get("architectures") or []
    )
    if placed is None or any(recoding.how.scheme == "int8" for recoding in placed.recodings.values()):
        raise _impossible("base and adapter cannot be brought together without a model in memory")
    injection, wide = placed.injection, {entry.dtype for entry in merge.entries.values()} == {"F32"}
    compared = inputs_to_compare(injection.backbone, None)[:BATCHES]
    try:
        with weights_from_disk(placed, _trained(placed)):
            tuned = logits_of(injection.backbone, compared, CPU)
        with weights_from_disk(placed, {}), injection.disabled():
            plain = logits_of(injection.backbone, compared, CPU)
    except (LightsftError, RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        raise _impossible(first_line(error)) from error
    reloaded = plain_logits(folder, injection.backbone.task or "chat", compared, from_disk=True)
    found = certify(compared, base=plain, tuned=tuned, merged=reloaded, reloaded=reloaded, half_precision=not wide)
    return found | {"compared": COMPARED}


def _impossible(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"check='layers': {reason}", expected="a model whose layers can be run one at a time", todo="--check tiles"
    )


def _trained(placed: Placed) -> dict[str, Tensor]:
    """Values of parameters and buffers that were trained in place."""
    changes = {k: v for primitive in placed.injection.primitives for k, v in (primitive.row_changes() or {}).items()}
    return {name: change.values for name, change in changes.items() if isinstance(change, Values)}


@contextmanager
def weights_from_disk(placed: Placed, trained: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the model computes: what a module reads is there while it runs, as stored or as `trained`."""
    model, files = placed.injection.model, _Files(placed, trained)
    before = {name: buffer for name, buffer in model.named_buffers() if "lightsft" not in name}
    handles: list[Any] = []
    try:
        for name in before:
            _put(model, name, placed.buffers[name] if name in placed.buffers else files.value(name))
        for reader, names in _read_by(placed).items():
            visit, module = _Visit(model, names, files), model.get_submodule(reader)
            handles.append(module.register_forward_pre_hook(visit.enter, prepend=True))
            handles.append(module.register_forward_hook(visit.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in before.items():
            _put(model, name, buffer)


def _read_by(placed: Placed) -> dict[str, list[str]]:
    """The parameters that are read inside each module; one that is read in several places has each name of it."""
    backbone = placed.injection.backbone
    elsewhere = {owner: reader for weight in backbone.anatomy.weights.values() for owner, reader in weight.places}
    called = backbone.anatomy.trace.calls if backbone.anatomy.trace is not None else {}
    found: dict[str, list[str]] = {}
    for name, _ in backbone.model.named_parameters(remove_duplicate=False):
        if "lightsft" not in name:
            owner = name.rpartition(".")[0]
            reader = elsewhere.get(name) or (nearest_called(owner, called) if called else owner)
            found.setdefault(reader, []).append(name)
    return found


@dataclass(frozen=True)
class _Files:
    """Where values come from: what was trained in place, and the base's files."""

    placed: Placed
    trained: Mapping[str, Tensor]

    def value(self, name: str) -> Tensor:
        """Of a parameter or buffer, by any of its names."""
        stored = self.placed.places.of.get(name, ())
        if name in self.trained or not stored:
            return self.trained[name] if name in self.trained else _trained(self.placed)[name]
        parts = [_read(tensor) for tensor in stored]
        recoding = self.placed.recodings.get(name)
        if recoding is not None:
            return recoding.whole(parts[0])
        return parts[0] if len(parts) == 1 else _stacked(parts, self.placed.injection.model, name)


def _read(tensor: StoredTensor) -> Tensor:
    """A map of the file."""
    with safe_open(tensor.file, "pt") as file:
        found: Tensor = file.get_tensor(tensor.name)
        return found


def _stacked(parts: list[Tensor], model: nn.Module, name: str) -> Tensor:
    """An expert tensor of the matrices of every expert, of one kind after the other."""
    experts = model.get_parameter(name).shape[0]
    kinds = [torch.stack(parts[first : first + experts]) for first in range(0, len(parts), experts)]
    return torch.cat(kinds, dim=1)


@dataclass(frozen=True)
class _Visit:
    """Hooks of a module: the parameters that it reads are brought, and put away."""

    model: nn.Module
    names: list[str]
    files: _Files
    without: dict[str, Tensor | None] = field(default_factory=dict)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before everything else that happens on the module."""
        for name in self.names:
            value = nn.Parameter(self.files.value(name), requires_grad=False)
            self.without.setdefault(name, _put(self.model, name, value))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After everything else."""
        for name in self.names:
            _put(self.model, name, self.without[name])


def _put(model: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
    """A parameter or buffer in the place of another, which is returned."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
    before: Tensor | None = held[attribute]
    held[attribute] = value
    return before
