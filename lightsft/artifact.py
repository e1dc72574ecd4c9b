"""Adapter folders: what an injection trained, on disk.

    adapter_model.safetensors   the tensors, under PEFT's key convention for every strategy: base_model.model.NAME for
                                those of a module, their plain name for those of none
    lightsft.json               strategy and options, seed, task, and a sketch of the backbone it belongs to
    adapter_config.json         for strategies that PEFT knows too: its configuration, so PeftModel opens the folder

Nothing in it depends on time or place: the same training writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightsft import registry
from lightsft.backbone import Backbone, same_values
from lightsft.dry_run import input_embeddings
from lightsft.errors import ArtifactError, BackboneError, LightsftError
from lightsft.files import write_file, write_json
from lightsft.injection import Injection, Strategy

TENSORS, SETTINGS, PEFT_SETTINGS = "adapter_model.safetensors", "lightsft.json", "adapter_config.json"
KEY_PREFIX = "base_model.model."
FORMAT = 1
_KINDS = {"format": int, "strategy": str, "options": dict, "seed": int, "base": dict}


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


def load(directory: str | Path, backbone: Backbone | PreTrainedModel | None = None) -> Injection:
    """Put a saved strategy onto `backbone` (by default the one it was trained on, loaded from where it was).

    Reads lightsft's folders and PEFT's. Raises ArtifactError for a damaged file, for missing, extra or misshapen
    tensors, and for a backbone other than the one it was trained on.
    """
    directory = Path(directory)
    tensors = read_tensors(directory)
    settings = read_settings(directory)
    if backbone is None:
        backbone = load_base(directory)
    elif not isinstance(backbone, Backbone):
        backbone = Backbone(backbone)
    if settings is not None:
        _check_base(directory, settings, backbone)
        strategy = registry.strategy(settings["strategy"], **settings["options"])
        injection = _restored(strategy, backbone, settings["seed"])
    else:
        tensors = _without_base_copies(directory, tensors, backbone)
        injection = _restored(_strategy_from_peft(directory, tensors), backbone)
    try:
        injection.load_tensors(tensors, origin=str(directory))
    except LightsftError:
        injection.eject()
        raise
    return injection


def _restored(strategy: Strategy, backbone: Backbone, seed: int = 0) -> Injection:
    """The strategy, placed to be given saved values: what it starts from does not matter."""
    backbone.restoring = True
    try:
        return strategy.inject(backbone, seed=seed)
    finally:
        backbone.restoring = False


def load_base(directory: Path, base: str | None = None, **options: Any) -> Backbone:
    """The backbone that a folder was trained on, from `base` or from where it was then."""
    settings = read_settings(directory) or {}
    peft = read_peft_settings(directory) or {}
    source = base or settings.get("base", {}).get("source") or peft.get("base_model_name_or_path")
    if not source:
        raise ArtifactError(
            f"{directory} does not say which model it was trained on",
            expected="the backbone",
            todo="name it: lightsft.load(directory, backbone), or --base MODEL",
        )
    task = settings.get("task") or {}
    chosen = {
        "task": task.get("name", "classification" if peft.get("task_type") == "SEQ_CLS" else "chat"),
        **options,
    }
    if task.get("labels"):
        chosen["labels"] = task["labels"]
    try:
        return Backbone.load(source, **chosen)
    except BackboneError as error:
        if base is not None:
            raise
        raise ArtifactError(
            f"the model that {directory} was trained on cannot be loaded: {error.found}",
            expected="the backbone, where it was then",
            todo="name where it is now: lightsft.load(directory, backbone), or --base MODEL",
        ) from error


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The content of lightsft.json, or None in a folder that PEFT wrote."""
    settings = _read_json(directory, SETTINGS)
    if settings is None:
        return None
    path = directory / SETTINGS
    if settings.get("format", FORMAT) != FORMAT:
        raise ArtifactError(
            f"{path} has format {settings['format']}",
            expected=f"format {FORMAT}, which this version of lightsft writes",
            todo="install the version of lightsft that wrote it",
        )
    wrong = [name for name, kind in _KINDS.items() if not isinstance(settings.get(name), kind)]
    if wrong or not isinstance(settings["base"].get("sketch"), dict):
        raise ArtifactError(
            f"{path} is damaged: {', '.join(wrong) or 'base.sketch'} is missing or of another type",
            expected="a file written by lightsft",
            todo="copy or train it again",
        )
    return settings


def read_peft_settings(directory: Path) -> dict[str, Any] | None:
    """The content of adapter_config.json, or None."""
    return _read_json(directory, PEFT_SETTINGS)


def is_adapter(directory: Path) -> bool:
    """Whether this folder holds a saved strategy."""
    return (directory / TENSORS).is_file()


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder, without the key prefix."""
    path = directory / TENSORS
    if not path.is_file():
        raise ArtifactError(
            f"{directory} holds no {TENSORS}",
            expected="an adapter folder written by lightsft or PEFT",
            todo="check the path; a merged checkpoint needs no adapter: load it with transformers",
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key.removeprefix(KEY_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}",
            expected="a complete safetensors file",
            todo="copy or train it again",
        ) from error
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise ArtifactError(
            f"{path} holds NaN or infinite values in {', '.join(broken[:5])}",
            expected="finite numbers",
            todo="the training diverged: lower the learning rate and train again",
        )
    return tensors


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
        },
    }


def _task_of(backbone: Backbone) -> dict[str, Any] | None:
    if backbone.task is None:
        return None
    labels = backbone.model.config.id2label if backbone.head else {}
    return {"name": backbone.task, "labels": [labels[index] for index in sorted(labels)]}


def _check_base(directory: Path, settings: Mapping[str, Any], backbone: Backbone) -> None:
    base = settings["base"]
    different = backbone.differences(_comparable(base, backbone))
    if different:
        shown = "\n  ".join(different[:6]) + (f"\n  and {len(different) - 6} more" if len(different) > 6 else "")
        raise ArtifactError(
            f"{directory} was trained on another backbone than this {type(backbone.model).__name__}:\n  {shown}",
            expected=f"the {base['class']} from {base['source']}",
            todo="load it onto that model",
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
    """PEFT saves a targeted embedding's own weight along, as `base_layer`: it must be the backbone's."""
    copies = {name: name.replace(".base_layer.", ".") for name in tensors if ".base_layer." in name}
    own = backbone.model.state_dict()
    for name, base_name in copies.items():
        if base_name not in own or not same_values(own[base_name], tensors[name]):
            raise ArtifactError(
                f"{directory} was trained on a model with another {base_name}",
                expected="the backbone it was trained on",
                todo="load it onto that model",
            )
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def _strategy_from_peft(directory: Path, tensors: Mapping[str, Tensor]) -> Strategy:
    config = read_peft_settings(directory)
    if config is None:
        raise ArtifactError(
            f"{directory} holds neither {SETTINGS} nor {PEFT_SETTINGS}",
            expected="an adapter folder written by lightsft or PEFT",
        )
    kinds: list[Any] = sorted(registry.strategies().values(), key=lambda kind: isinstance(kind, registry.Family))
    for reader in (kind for kind in kinds if isinstance(kind, ReadsPeft)):
        strategy = reader.from_peft(config, tensors)
        if strategy is not None:
            return strategy
    raise ArtifactError(
        f"{directory} is a PEFT folder of type {config.get('peft_type')!r}",
        expected="a method that an installed strategy computes (`lightsft strategies` lists them)",
        todo="open it with PEFT",
    )


def _read_json(directory: Path, name: str) -> dict[str, Any] | None:
    path = directory / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", expected="JSON", todo="copy or train it again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}", expected="a JSON object")
    return content
