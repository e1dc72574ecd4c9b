"""The files of an adapter folder, read without a model: its tensors, its settings, PEFT's.

Nothing here needs transformers, whose import takes longer than merging a small checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightsft.errors import ArtifactError
from lightsft.finite import is_finite

TENSORS, SETTINGS, PEFT_SETTINGS = "adapter_model.safetensors", "lightsft.json", "adapter_config.json"
KEY_PREFIX = "base_model.model."
FORMAT = 1
_KINDS = {"format": int, "strategy": str, "options": dict, "seed": int, "base": dict}


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
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ArtifactError(
            f"{path} holds NaN or infinite values in {', '.join(broken[:5])}",
            expected="finite numbers",
            todo="the training diverged: lower the learning rate and train again",
        )
    return tensors


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
