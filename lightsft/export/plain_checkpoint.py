"""Checkpoint folders that another tool's converter is given: whole, in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightsft.errors import ConfigurationError
from lightsft.files import read_json


def require_plain(folder: Path, base: str | None) -> dict[str, Any]:
    """The content of config.json; raises ConfigurationError for what is no checkpoint, or one in codes."""
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{folder} is neither an adapter folder nor a checkpoint folder",
            expected="a folder written by lightsft train or merge, or by transformers",
            todo="check the path; a hub id has to be downloaded first",
        )
    if base is not None:
        raise ConfigurationError(
            f"{folder} is a whole checkpoint, and --base {base} was given", expected="no base", todo="leave --base out"
        )
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise ConfigurationError(
            f"{folder} holds codes ({config['quantization_config'].get('quant_method')})",
            expected="weights in floating point",
            todo="merge onto plain weights (lightsft merge --onto base) and export that folder",
        )
    return config


def architecture(config: dict[str, Any]) -> str:
    """The class that a configuration names."""
    return str((config.get("architectures") or ["a model of no class"])[0])
