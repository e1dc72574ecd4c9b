"""Folders that AdapterHub's library wrote, read without running anything that is in them.

    adapter_config.json                                 the adapter's name, its model and its options
    adapter.safetensors or pytorch_adapter.bin          its tensors, under the library's names
    head_config.json                                    with a prediction head: its kind and its labels
    model_head.safetensors or pytorch_model_head.bin    the head's tensors

A pickle is opened by torch's reader of weights, which makes tensors and plain containers and runs no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightsft.adapter_files import PEFT_SETTINGS, is_adapter
from lightsft.errors import ArtifactError

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD, HEAD_WEIGHTS = "head_config.json", ("model_head.safetensors", "pytorch_model_head.bin")
OLDER = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")  # names of before there were versions
INVERTIBLE = {"inv_adapter", "invertible_adapter", "inv_adapter_reduction_factor"}
FLEXIBLE = ("AdapterModel", "ModelWithHeads")  # endings of the library's own classes, whose heads have names


@dataclass(frozen=True)
class Head:
    """A prediction head: its configuration (None: that of the model's class), its labels in order, its tensors."""

    config: Mapping[str, Any] | None
    labels: tuple[str, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterHubFolder:
    """One adapter: its options, the model that it was trained on, its tensors."""

    path: Path
    name: str
    options: Mapping[str, Any]
    version: str | None
    model_type: str
    model_class: str
    model_name: str | None
    hidden_size: int | None
    tensors: Mapping[str, Tensor]
    head: Head | None

    @property
    def architecture(self) -> str:
        """The method: "bottleneck", "lora", "prefix_tuning" or another one of the library's."""
        return str(self.options.get("architecture") or "bottleneck")

    @property
    def flexible(self) -> bool:
        """Whether the model was of one of the library's own classes."""
        return self.model_class.endswith(FLEXIBLE)

    def parts(self, kind: str) -> Iterator[tuple[str, str, Tensor]]:
        """(place, part, tensor) of the tensors called `place.kind.name.part`; ArtifactError if there are others."""
        pattern = re.compile(rf"(.+)\.{kind}\.{re.escape(self.name)}\.(.+)")
        found = {key: pattern.fullmatch(key) for key in self.tensors}
        others = sorted(key for key, match in found.items() if match is None)
        if others or not found:
            raise self.wrong(
                f"holds tensors that are no part of {self.architecture}: {', '.join(others[:5])}"
                if others
                else "holds no tensors",
                expected=f"tensors called MODULE.{kind}.{self.name}.PART",
            )
        for key, match in found.items():
            assert match is not None
            yield match[1], match[2], self.tensors[key]

    def wrong(self, what: str, *, expected: str = "", todo: str = "save it again with AdapterHub") -> ArtifactError:
        """An error about this folder."""
        return ArtifactError(f"{self.path} {what}", expected=expected, todo=todo)


def is_adapterhub(directory: Path) -> bool:
    """Whether AdapterHub wrote this folder, or a part of it."""
    if is_adapter(directory):
        return False
    return any((directory / name).is_file() for name in WEIGHTS) or "model_class" in (_json(directory / PEFT_SETTINGS))


def read_folder(directory: Path) -> AdapterHubFolder:
    """The content of a folder. Raises ArtifactError for what is missing, damaged or no tensor."""
    config = _json(directory / PEFT_SETTINGS)
    kinds = {"name": str, "model_type": str, "model_class": str, "config": dict}
    _require(directory / PEFT_SETTINGS, config, kinds)
    tensors = _tensors(directory, WEIGHTS)
    if tensors is None:
        raise ArtifactError(
            f"{directory} holds neither {' nor '.join(WEIGHTS)}",
            expected="a folder written by save_adapter",
            todo="copy it again",
        )
    tensors = {OLDER.sub(".adapters.", name): tensor for name, tensor in tensors.items()}
    return AdapterHubFolder(
        path=directory,
        options=_options(config, tensors),
        version=config.get("version"),
        model_name=config.get("model_name") or None,
        hidden_size=config.get("hidden_size"),
        tensors=tensors,
        head=_head(directory),
        **{name: config[name] for name in ("name", "model_type", "model_class")},
    )


def _options(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The method's; the oldest task adapters name invertible adapters that they do not have, which count as none."""
    options: Mapping[str, Any] = config["config"]
    if config.get("type") == "text_task" and not any("invertible" in name for name in tensors):
        return {name: value for name, value in options.items() if name not in INVERTIBLE}
    return options


def _head(directory: Path) -> Head | None:
    tensors = _tensors(directory, HEAD_WEIGHTS)
    if not tensors:
        return None
    config = _json(directory / HEAD)
    _require(directory / HEAD, config, {"model_class": str})
    own = config.get("config")
    said = own if isinstance(own, dict) else config
    prefix = f"heads.{config.get('name')}." if isinstance(own, dict) else ""
    return Head(
        config=own,
        labels=_labels(directory / HEAD, said),
        tensors={name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
    )


def _labels(path: Path, said: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the labels in order; those that transformers would give where there is only a number of them."""
    number, named = said.get("num_labels") or 0, said.get("label2id")
    if named is None and isinstance(number, int):
        return tuple(f"LABEL_{index}" for index in range(number))
    if not isinstance(named, dict) or not all(isinstance(index, int) for index in named.values()):
        raise _damaged(path, f"label2id is {named!r}, num_labels is {number!r}")
    if sorted(named.values()) != list(range(len(named))):
        raise _damaged(path, f"label2id is {named!r}: no numbers from 0 on")
    return tuple(sorted(named, key=named.__getitem__))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    return content


def _require(path: Path, content: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise _damaged(path, f"{', '.join(wrong)} missing or of another type")


def _tensors(directory: Path, names: tuple[str, str]) -> dict[str, Tensor] | None:
    """The tensors of the first of two files that is there, in fp32; None if neither is."""
    safe, pickled = (directory / name for name in names)
    path = safe if safe.is_file() else pickled
    if not path.is_file():
        return None
    try:
        content = load_file(path) if path is safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file, or one that is no file of tensors, makes of the reader
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise _damaged(path, f"no tensors can be read from it ({reason[:200]})") from error
    if not isinstance(content, dict) or not all(_is_entry(name, value) for name, value in content.items()):
        raise _damaged(path, "it holds something other than named tensors")
    broken = [name for name, tensor in content.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise _damaged(path, f"NaN or infinite values in {', '.join(broken[:5])}")
    return {name: tensor.detach().float() for name, tensor in content.items()}


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged: {what}", expected="a file written by AdapterHub", todo="copy or save it again"
    )
