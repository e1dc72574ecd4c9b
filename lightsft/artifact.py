"""Adapter folders: what an injection trained, on disk.

    adapter_model.safetensors   the tensors, under PEFT's key convention for every strategy: base_model.model.NAME for
                                those of a module, their plain name for those of none
    lightsft.json               strategy and options, seed, task, and a sketch of the backbone it belongs to
    adapter_config.json         for strategies that PEFT knows too: its configuration, so PeftModel opens the folder

Nothing in it depends on time or place: the same training writes the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from lightsft import registry
from lightsft.adapter_files import (
    FORMAT,
    KEY_PREFIX,
    PEFT_SETTINGS,
    SETTINGS,
    TENSORS,
    read_peft_settings,
    read_settings,
    read_tensors,
)
from lightsft.backbone import Backbone, loading, locate
from lightsft.device import dtype_name
from lightsft.dry_run import input_embeddings
from lightsft.errors import ArtifactError, BackboneError, LightsftError
from lightsft.files import write_file, write_json
from lightsft.injection import Injection, Strategy
from lightsft.quantization import Quantization
from lightsft.sketch import same_values

_TASKS_OF_PEFT = {"SEQ_CLS": "classification", "CAUSAL_LM": "chat", None: "chat"}
_TASKS_OF_CLASSES = {
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "chat": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}  # class names by type of model


@runtime_checkable
class WritesCompanions(Protocol):
    """A strategy that writes more files into its folder (a whole checkpoint)."""

    def write_companions(self, injection: Injection, directory: Path) -> None:
        """Write them."""
        ...


@runtime_checkable
class WritesPeftConfig(Protocol):
    """A strategy that PEFT knows too."""

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """Write PEFT's configuration, so that PeftModel.from_pretrained opens the folder, or say why it cannot."""
        ...


@runtime_checkable
class ReadsPeft(Protocol):
    """A strategy class that recognises PEFT configurations."""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Strategy | None:
        """The strategy that this configuration and these tensors mean, or None if they are another's."""
        ...


def save(injection: Injection, directory: Path, *, task: Mapping[str, Any] | None = None) -> Path:
    """Write the adapter folder; `task` is what `Task.describe()` says, kept for prediction."""
    tensors = {_key(name): tensor.detach().cpu().contiguous() for name, tensor in injection.tensors().items()}
    write_file(directory / TENSORS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(directory / SETTINGS, _settings(injection, task))
    (directory / PEFT_SETTINGS).unlink(missing_ok=True)  # of what was saved here before
    if isinstance(injection.strategy, WritesCompanions):
        injection.strategy.write_companions(injection, directory)
    if isinstance(injection.strategy, WritesPeftConfig):
        injection.strategy.write_peft_config(injection, directory)
    return directory


def _key(name: str) -> str:
    return KEY_PREFIX + name if "." in name else name


def load(
    directory: str | Path, backbone: Backbone | PreTrainedModel | None = None, *, other_quantization: bool = False
) -> Injection:
    """Put a saved strategy onto `backbone` (by default the one it was trained on, loaded from where it was).

    Reads lightsft's folders and PEFT's. Raises ArtifactError for a damaged file, for missing, extra or misshapen
    tensors, and for a backbone other than the one it was trained on; `other_quantization` lets one pass that holds the
    same model quantized in another way, or not at all.
    """
    directory = Path(directory)
    tensors = read_tensors(directory)
    if backbone is None:
        backbone = load_base(directory)
    elif not isinstance(backbone, Backbone):
        backbone = Backbone(backbone)
    injection, tensors = placed(directory, backbone, tensors, other_quantization=other_quantization)
    try:
        injection.load_tensors(tensors, origin=str(directory))
    except LightsftError:
        injection.eject()
        raise
    return injection


def placed(
    directory: Path, backbone: Backbone, tensors: dict[str, Tensor], *, other_quantization: bool = False
) -> tuple[Injection, dict[str, Tensor]]:
    """The strategy of a folder on `backbone`, yet to be given values, and those of the folder's tensors that it takes.

    A backbone without values is not compared with the one that the folder was trained on.
    """
    settings, has_values = read_settings(directory), backbone.model.device.type != "meta"
    if settings is not None:
        if has_values:
            _check_base(directory, settings, backbone, other_quantization)
        strategy = registry.strategy(settings["strategy"], **settings["options"])
        return _restored(strategy, backbone, settings["seed"]), tensors
    if has_values:
        tensors = _without_base_copies(directory, tensors, backbone)
    return _restored(_strategy_from_peft(directory, tensors), backbone), tensors


def _restored(strategy: Strategy, backbone: Backbone, seed: int = 0) -> Injection:
    """The strategy, placed to be given saved values: what it starts from does not matter."""
    backbone.restoring = True
    try:
        return strategy.inject(backbone, seed=seed)
    finally:
        backbone.restoring = False


def load_base(directory: Path, base: str | None = None, *, as_quantized: bool = True, **options: Any) -> Backbone:
    """The backbone that a folder was trained on, from `base` or from where it was then, quantized as it was then."""
    settings = read_settings(directory) or {}
    peft = read_peft_settings(directory) or {}
    source = base or settings.get("base", {}).get("source") or peft.get("base_model_name_or_path")
    if not source:
        raise ArtifactError(
            f"{directory} does not say which model it was trained on",
            expected="the backbone",
            todo="name it: lightsft.load(directory, backbone), or --base MODEL",
        )
    try:
        then = _as_quantized_then(settings, source) if as_quantized else {}
        backbone = Backbone.load(source, **{**what_to_load(directory, settings, peft), **options, **then})
        if then and options.get("dtype") in ("float32", torch.float32):
            backbone.cast(torch.float32)
        return backbone
    except BackboneError as error:
        if base is not None:
            raise
        raise ArtifactError(
            f"the model that {directory} was trained on cannot be loaded: {error.found}",
            expected="the backbone, where it was then",
            todo="name where it is now: lightsft.load(directory, backbone), or --base MODEL",
        ) from error


def _as_quantized_then(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The quantization of the base, and the type that its codes were made from: another gives other codes.

    A source that holds the codes themselves needs no quantization.
    """
    how = Quantization.parse(settings.get("base", {}).get("quantization"))
    if how is None:
        return {}
    with loading(source):
        folder, gguf = locate(source)
        config = PreTrainedConfig.get_config_dict(folder)[0] if gguf is None else {}
    if config.get("quantization_config"):
        return {"dtype": settings["base"]["dtype"]}
    return {"quantization": how.scheme, "double_quantization": how.double, "dtype": settings["base"]["dtype"]}


def what_to_load(directory: Path, settings: Mapping[str, Any], peft: Mapping[str, Any]) -> dict[str, Any]:
    """The task of a folder, with its labels; of a model for another task, the class that it is."""
    task = settings.get("task") or {}
    if task:
        return {"task": task["name"], **({"labels": task["labels"]} if task.get("labels") else {})}
    if not settings and peft.get("task_type") in _TASKS_OF_PEFT:
        return {"task": _TASKS_OF_PEFT[peft["task_type"]]}
    name = str(settings["base"].get("class") if settings else peft["task_type"])
    for known, classes in _TASKS_OF_CLASSES.items():
        if settings and classes.get(settings["base"].get("model_type")) == name:
            return {"task": known}
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ArtifactError(
            f"{directory} was trained on a {name}, which lightsft does not load by itself",
            expected=f"a task ({', '.join(_TASKS_OF_CLASSES)}) or a class of transformers",
            todo="load the model and give it: lightsft.load(directory, model)",
        )
    return {"task": None, "kind": kind}


def options_of(strategy: Strategy) -> dict[str, Any]:
    """A strategy's options as `registry.strategy` takes them; strategies among them by name, with their options."""
    return {field.name: _plain(getattr(strategy, field.name)) for field in dataclasses.fields(strategy)}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Strategy) and not isinstance(value, type):
        return {"name": registry.name_of(value), **options_of(value)}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _settings(injection: Injection, task: Mapping[str, Any] | None) -> dict[str, Any]:
    backbone = injection.backbone
    return {
        "format": FORMAT,
        "strategy": registry.name_of(injection.strategy),
        "options": options_of(injection.strategy),
        "seed": injection.seed,
        "task": dict(task) if task is not None else _task_of(backbone),
        "base": {
            "source": backbone.source,
            "class": type(backbone.model).__name__,
            "model_type": backbone.model.config.model_type,
            "sketch": injection.sketch,
            "tokens": _tokens(backbone),
            "quantization": backbone.quantization,
            "dtype": dtype_name(backbone.stored_dtype),
        },
    }


def _task_of(backbone: Backbone) -> dict[str, Any] | None:
    if backbone.task is None:
        return None
    labels = backbone.model.config.id2label if backbone.head else {}
    return {"name": backbone.task, "labels": [labels[index] for index in sorted(labels)]}


def _check_base(directory: Path, settings: Mapping[str, Any], backbone: Backbone, other_quantization: bool) -> None:
    base = settings["base"]
    sketch = _comparable(base, backbone)
    if base.get("quantization") != backbone.quantization:
        if not other_quantization:
            raise _other_quantization(directory, base.get("quantization"), backbone)
        linear = {owner for name in backbone.anatomy.linear for owner in backbone.anatomy.weights[name].owners}
        sketch = {name: values for name, values in sketch.items() if name not in linear}
    different = backbone.differences(sketch)
    if different:
        shown = "\n  ".join(different[:6]) + (f"\n  and {len(different) - 6} more" if len(different) > 6 else "")
        raise ArtifactError(
            f"{directory} was trained on another backbone than this {type(backbone.model).__name__}:\n  {shown}",
            expected=f"the {base['class']} from {base['source']}",
            todo="load it onto that model",
        )


def _other_quantization(directory: Path, trained: str | None, backbone: Backbone) -> ArtifactError:
    """The strategy made up for the errors of one quantization, which another does not have."""
    how = Quantization.parse(trained)
    if how is not None:
        way = f"load it with quantization={how.scheme!r}, double_quantization={how.double}"
    else:
        way = "load it without a quantization" if trained is None else "load the checkpoint that holds them so"
    return ArtifactError(
        f"{directory} was trained beside weights in {trained or 'floating point'}; this "
        f"{type(backbone.model).__name__} holds them in {backbone.quantization or 'floating point'}",
        expected=f"the same model in {trained or 'floating point'}",
        todo=f"{way}, or go on all the same with lightsft.load(..., other_quantization=True)",
    )


def _tokens(backbone: Backbone) -> int | None:
    """How many tokens the backbone has a row for, None where it looks none up."""
    weight = getattr(input_embeddings(backbone.model), "weight", None)
    return len(weight) if isinstance(weight, Tensor) else None


def _comparable(base: Mapping[str, Any], backbone: Backbone) -> dict[str, list[float]]:
    """The sketch without the tables of the vocabulary, if that has another size now: the model was resized."""
    sketch: dict[str, list[float]] = base["sketch"]
    tokens = _tokens(backbone)
    if tokens is None or base.get("tokens") in (None, tokens):
        return sketch
    own = dict(backbone.model.named_parameters())
    return {name: values for name, values in sketch.items() if name not in own or tokens not in own[name].shape}


def _without_base_copies(directory: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """PEFT saves the own weight of a targeted embedding or head along, as `base_layer`: it must be the backbone's."""
    model, ending = backbone.model, ".base_layer.weight"
    tables = {id(table) for table in (input_embeddings(model), model.get_output_embeddings()) if table is not None}
    tables |= {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    owners = {f"{name}{ending}": name for name, module in model.named_modules() if id(module) in tables}
    for name in owners.keys() & tensors.keys():
        if not same_values(model.get_parameter(f"{owners[name]}.weight"), tensors[name]):
            raise ArtifactError(
                f"{directory} was trained on a model with another {owners[name]}.weight",
                expected="the backbone it was trained on",
                todo="load it onto that model",
            )
    return {name: tensor for name, tensor in tensors.items() if name not in owners}


def _strategy_from_peft(directory: Path, tensors: Mapping[str, Tensor]) -> Strategy:
    config = read_peft_settings(directory)
    if config is None:
        raise ArtifactError(
            f"{directory} holds neither {SETTINGS} nor {PEFT_SETTINGS}",
            expected="an adapter folder written by lightsft or PEFT",
        )
    kinds: list[Any] = sorted(registry.usable().values(), key=lambda kind: isinstance(kind, registry.Family))
    for reader in (kind for kind in kinds if isinstance(kind, ReadsPeft)):
        strategy = reader.from_peft(config, tensors)
        if strategy is not None:
            return strategy
    raise ArtifactError(
        f"{directory} is a PEFT folder of type {config.get('peft_type')!r}",
        expected="a method that an installed strategy computes (`lightsft strategies` lists them)",
        todo="open it with PEFT",
    )
