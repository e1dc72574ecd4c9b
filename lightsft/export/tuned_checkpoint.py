"""What tuning changed of a checkpoint: two folders of safetensors, read tensor by tensor, never a whole model.

Which tensor is which module's is found on a model without weights, of the class that the tuned folder names. A
parameter is looked for under its own name, under that name without or with the prefix of the base model ("bert."), and
under the names of weights that are tied to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from lightsft.backbone import SKETCH_TENSORS, Backbone, loading
from lightsft.dry_run import input_embeddings
from lightsft.errors import ArtifactError, BackboneError, ConfigurationError
from lightsft.export.as_lora import AsLoRA
from lightsft.export.checkpoint_files import Checkpoint, StoredTensor, read_checkpoint
from lightsft.export.layout import TYPES
from lightsft.export.low_rank_fit import norm
from lightsft.injection import Injection
from lightsft.meta import weightless
from lightsft.primitives import PlacedSide
from lightsft.sketch import sketched

_SHOWN = 12
_TASKS = {
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "chat": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


@dataclass(frozen=True)
class TunedCheckpoint:
    """Two checkpoints of one model, by the names of its parameters, and that model without weights."""

    folder: Path
    base: Path
    backbone: Backbone
    before: Mapping[str, StoredTensor]
    after: Mapping[str, StoredTensor]

    def add_to(self, converted: AsLoRA) -> None:
        """Hand over every change, small ones first: what is left is known before anything is decomposed."""
        names = sorted(self.before.keys() & self.after.keys(), key=lambda name: (len(self.after[name].shape), name))
        for name in names:
            before, after = self.before[name], self.after[name]
            if before.shape != after.shape:
                converted.leave(name, None, f"it has {after.shape[0]} rows, and {before.shape[0]} in the base")
            elif before.dtype in TYPES and after.dtype in TYPES:
                converted.add(name, values(before), values(after))
            elif before.dtype != after.dtype or norm(_bytes(before).float() - _bytes(after).float()):
                converted.leave(name, None, f"it is kept as {after.dtype}")

    def placed(self, converted: AsLoRA) -> Injection:
        """The LoRA, with its factors and the tuned head in place of what has no values."""
        with weightless():
            injection = converted.strategy().inject(self.backbone)
        factors = converted.tensors()
        for primitive in injection.primitives:
            if isinstance(primitive, PlacedSide):
                own = {name: factors[f"{primitive.name}.{name}"] for name in primitive.side.tensors()}
                primitive.side.load_state_dict(own, assign=True)
        whole = {name: values(self.after[name]) for name, tensor in injection.tensors().items() if tensor.is_meta}
        injection.model.load_state_dict(whole, strict=False, assign=True)
        injection.sketch = self._sketch()
        return injection

    def _sketch(self) -> dict[str, list[float]]:
        """Of the base, as a backbone that is loaded from it has one."""
        head = self.backbone.head
        parameters = self.backbone.model.named_parameters()
        names = [name for name, p in parameters if p.ndim >= 2 and name not in head and "lightsft" not in name]
        step = max(1, len(names) // SKETCH_TENSORS)
        stored = [name for name in names[::step][:SKETCH_TENSORS] if name in self.before]
        return {name: _some_values(self.before[name]) for name in stored}


def open_tuned(folder: Path, base: Path) -> TunedCheckpoint:
    """Two checkpoint folders; raise ArtifactError with all names and shapes that do not match."""
    backbone = _model_of(folder, base)
    names = _Names(backbone.model)
    before, after = names.of(read_checkpoint(base)), names.of(read_checkpoint(folder))
    wrong = [f"{name} is in neither folder" for name in names.own - before.keys() - after.keys()]
    wrong += [f"{name} is not in {folder}" for name in names.own & before.keys() - after.keys()]
    new = names.own & after.keys() - before.keys() - backbone.head
    wrong += [f"{name} is not in {base}" for name in new]
    tables = _tables(backbone.model)
    wrong += [
        f"{name} is {_shape(after[name])} in {folder}, {_shape(before[name])} in {base}"
        for name in before.keys() & after.keys() - backbone.head
        if before[name].shape != after[name].shape
        and not (name in tables and before[name].shape[1:] == after[name].shape[1:])
    ]
    if wrong:
        shown = "\n  ".join(sorted(wrong)[:_SHOWN]) + (f"\n  and {len(wrong) - _SHOWN} more" if wrong[_SHOWN:] else "")
        raise ArtifactError(
            f"{folder} was not tuned from {base}, as {type(backbone.model).__name__} reads them:\n  {shown}",
            expected="two checkpoints with the same weights, but for a new task head",
            todo="name the base that it was tuned from with --base",
        )
    return TunedCheckpoint(folder, base, backbone, before, after)


def values(stored: StoredTensor) -> Tensor:
    """A tensor from its file, in fp32."""
    return _bytes(stored).view(TYPES[stored.dtype]).reshape(stored.shape).float()


def _bytes(stored: StoredTensor) -> Tensor:
    held = torch.empty(stored.size, dtype=torch.uint8)
    array: Any = held.numpy()
    view = memoryview(array)
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        while view:
            count = file.readinto(view)
            if not count:
                raise OSError(f"{stored.file} is shorter than its header says")
            view = view[count:]
    return held


def _some_values(stored: StoredTensor) -> list[float]:
    flat = values(stored).flatten()
    return [float(flat[position]) for position in sketched(flat.numel())]


def _shape(stored: StoredTensor) -> str:
    return " x ".join(map(str, stored.shape))


def _model_of(folder: Path, base: Path) -> Backbone:
    """The tuned folder's model without weights, as a backbone that comes from the base."""
    with loading(str(folder)):
        config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise BackboneError(
            f"{folder} names {name or 'no class'} as its architecture",
            expected="a class of transformers",
            todo="tune it with lightsft or PEFT, or convert the adapter folder",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise BackboneError(
            f"{folder} is quantized", expected="a checkpoint in floating point", todo="convert the one it was made of"
        )
    task = next((task for task, classes in _TASKS.items() if classes.get(config.model_type) == name), None)
    with weightless():
        backbone = Backbone(kind(config), task=task, source=str(base))
        if isinstance(config.dtype, torch.dtype):
            backbone.cast(config.dtype)
        backbone.anatomy  # noqa: B018 - its trace needs shapes alone
    return backbone


def _tables(model: PreTrainedModel) -> set[str]:
    """The weights that have a row for each token."""
    ends = (input_embeddings(model), model.get_output_embeddings())
    held = {id(p) for end in ends if end is not None for p in end.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in held}


class _Names:
    """The parameters that a stored tensor may be."""

    def __init__(self, model: PreTrainedModel) -> None:
        first: dict[int, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        self.first = {name: first.setdefault(id(parameter), name) for name, parameter in named}
        self.own = set(self.first.values())
        self.prefix = f"{model.base_model_prefix}."

    def of(self, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        """By the parameter's first name; what is no parameter keeps its own."""
        return {self._parameter(name): tensor for name, tensor in checkpoint.tensors.items()}

    def _parameter(self, name: str) -> str:
        return next((self.first[one] for one in self._spellings(name) if one in self.first), name)

    def _spellings(self, name: str) -> Iterator[str]:
        for one in (name, name.replace(".gamma", ".weight").replace(".beta", ".bias")):  # norms of old checkpoints
            yield from (one, self.prefix + one, one.removeprefix(self.prefix))


def require_folder(base: str | None, source: Path) -> Path:
    """The folder of the base that a tuned checkpoint came from."""
    if base is None:
        raise ConfigurationError(
            f"{source} holds a whole checkpoint, which does not say what it was tuned from",
            expected="the checkpoint folder that the tuning began with",
            todo="name it with --base FOLDER",
        )
    folder = Path(base)
    if not (folder / "config.json").is_file():
        raise BackboneError(
            f"{base} is no checkpoint folder",
            expected="a folder with config.json and safetensors: both are read from disk",
            todo="download it first, and name the folder with --base",
        )
    return folder
