"""AdapterHub's folders as strategies on a backbone: the model with its head, the strategy, its tensors.

The backbone is loaded as the class that the adapter was trained on. A head of the library's own kind becomes the head
of the class in transformers that computes the same, where there is one. A head that the base holds too (that of a
language model) is left where it is equal, and trained whole where it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import modeling_auto

from lightsft import artifact, registry
from lightsft.artifact import options_of
from lightsft.backbone import Backbone
from lightsft.errors import ArtifactError, LightsftError
from lightsft.export.adapterhub_folder import AdapterHubFolder, read_folder
from lightsft.export.adapterhub_methods import method_of
from lightsft.injection import Injection, Strategy
from lightsft.sketch import same_values

# Heads of the library's own kind: (layers, use_pooler) by type of model, and the layers' names in transformers. Two
# layers with tanh between them are BERT's pooler and classifier.
_CLASSIFIERS: dict[tuple[Any, ...], Mapping[str, str]] = {
    ("bert", 1, True): {"1": "classifier"},
    ("bert", 2, False): {"1": "bert.pooler.dense", "4": "classifier"},
    ("roberta", 2, False): {"1": "classifier.dense", "4": "classifier.out_proj"},
    ("xlm-roberta", 2, False): {"1": "classifier.dense", "4": "classifier.out_proj"},
}


def load(directory: Path, base: str | None = None, dtype: str = "checkpoint") -> Injection:
    """The strategy that AdapterHub's folder holds, on `base` or on the model that the folder names.

    Raises ArtifactError for a damaged folder, for options and heads that cannot be expressed (all of them at once), for
    tensors that do not fit the base; BackboneError for a base that cannot be loaded.
    """
    folder = read_folder(directory)
    method, names = method_of(folder), _head_names(folder)
    backbone = _backbone(folder, base, dtype)
    head = _head_tensors(folder, backbone, names)
    strategy = method.strategy(backbone)
    whole = sorted(set(head) - backbone.head)
    injection = (_with_whole(strategy, whole) if whole else strategy).inject(backbone)
    try:
        standing = backbone.head | set(backbone.moving_buffers)
        own = {name: tensor for name, tensor in injection.tensors().items() if name in standing}
        injection.load_tensors(own | method.tensors(injection) | head, origin=str(directory))
    except LightsftError:
        injection.eject()
        raise
    return injection


def _with_whole(strategy: Strategy, whole: Sequence[str]) -> Strategy:
    """The strategy, and these parameters trained whole."""
    if any(field.name == "modules_to_save" for field in dataclasses.fields(strategy)):
        return dataclasses.replace(strategy, modules_to_save=tuple(whole))
    own = {"name": registry.name_of(strategy), **options_of(strategy)}
    return registry.strategy("combined", strategies=[own, {"name": "full", "targets": list(whole)}])


# ---- the backbone


def _backbone(folder: AdapterHubFolder, base: str | None, dtype: str) -> Backbone:
    """The model of the class that the folder means, of the size that it says."""
    source = base or folder.model_name
    if not source:
        raise folder.wrong("does not say which model it was trained on", todo="name it: --base MODEL")
    kind = {"class": _model_class(folder), "model_type": folder.model_type}
    what = artifact.what_to_load(folder.path, {"base": kind}, {})
    if what.get("task") == "classification" and folder.head is not None and folder.head.labels:
        what["labels"] = folder.head.labels
        if len(folder.head.labels) == 1:
            raise folder.wrong(
                "holds a head with num_labels=1: a regression", expected="labels to choose from", todo=""
            )
    backbone = Backbone.load(source, dtype=dtype, device="cpu", **what)
    said = {"model_type": folder.model_type, "hidden_size": folder.hidden_size}
    found = {name: getattr(backbone.model.config, name, None) for name in said}
    if any(found[name] != value for name, value in said.items() if value is not None):
        raise ArtifactError(
            f"{folder.path} was trained on another model than {source}, which has {_listed(found)}",
            expected=_listed(said),
            todo="name the model that it was trained on: --base MODEL",
        )
    return backbone


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _model_class(folder: AdapterHubFolder) -> str:
    """The class in transformers: for the library's own ones a classifier, or the bare model if there is no head."""
    if not folder.flexible:
        return folder.model_class
    names = modeling_auto.MODEL_MAPPING_NAMES
    if folder.head is not None:
        names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    found: Any = names.get(folder.model_type)
    if not isinstance(found, str):
        raise folder.wrong(f"was trained on a {folder.model_type}, which transformers does not know", todo="")
    return found


# ---- the head


def _head_names(folder: AdapterHubFolder) -> Mapping[str, str]:
    """Names in transformers of the layers of a head; empty where they have the same ones."""
    if folder.head is None:
        return {}
    config = folder.head.config
    if config is None:
        return {}
    names = _CLASSIFIERS.get((folder.model_type, config.get("layers"), config.get("use_pooler")))
    between = config.get("activation_function") if config.get("layers") != 1 else "tanh"
    plain = config.get("head_type") == "classification" and config.get("bias", True) and between == "tanh"
    if names is None or not plain or config.get("num_labels") == 1:
        said = ("head_type", "layers", "activation_function", "use_pooler", "bias", "num_labels")
        raise folder.wrong(
            f"holds a head that no {folder.model_type} of transformers has: "
            + _listed({name: config.get(name) for name in said}),
            expected="a classifier as AdapterHub adds it to a bert, roberta or xlm-roberta, or a class of transformers",
            todo="save the adapter without it (with_head=False), and train a head with lightsft",
        )
    return names


def _head_tensors(folder: AdapterHubFolder, backbone: Backbone, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The head's tensors that are not the base's own, by the names in transformers."""
    given = {} if folder.head is None else folder.head.tensors
    renamed = {_renamed(name, names): tensor for name, tensor in given.items()}
    own = dict(backbone.model.named_parameters(remove_duplicate=False))
    first = dict(backbone.model.named_parameters())
    missing = [] if backbone.model.base_model is backbone.model else sorted(backbone.fresh - renamed.keys())
    other = [name for name in renamed if name not in own]
    changed = {name for name in renamed.keys() & own.keys() if not _equal(own[name], renamed[name])}
    tied = sorted(name for name in changed - first.keys() if not same_values(own[name], renamed[name]))
    problems = [f"missing {name}, which the base does not hold" for name in missing]
    problems += [f"unexpected {name}" for name in sorted(other)]
    problems += [f"{name} is not that of the base, which shares it with its embeddings" for name in tied]
    if problems:
        raise folder.wrong(
            f"has another head than {type(backbone.model).__name__}:\n  " + "\n  ".join(problems[:12]),
            expected="the head of the model that it was trained on",
            todo="save it again with its head, or name the base that it was trained on: --base MODEL",
        )
    kept = backbone.head | (changed & first.keys())
    return {name: tensor for name, tensor in renamed.items() if name in kept}


def _equal(own: Tensor, given: Tensor) -> bool:
    """Whether the base holds the very same values, in its own type."""
    return torch.equal(own.detach(), given.to(own.dtype))


def _renamed(name: str, names: Mapping[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{names[layer]}.{kind}" if layer in names else name
