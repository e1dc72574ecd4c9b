"""Everything of a checkpoint but its weights, which travels with every export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightsft.adapter_files import read_settings
from lightsft.files import read_json, write_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz")
_INDEX = ".index.json"
_CARD = "README.md"
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")


def copy_companions(base: Path, adapter: Path | None, out: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Configuration, tokenizer, templates, licence: the base's, and over them the adapter's own tokenizer.

    `settings` are what config.json says otherwise than the base's. The base's card describes the base, and stays.
    """
    for name in _files(base):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, out / name)
    if adapter is not None:
        for name in _files(adapter):
            if str(name).startswith(_TOKENIZER):
                shutil.copyfile(adapter / name, out / name)
    if settings and (out / "config.json").is_file():
        config = read_json(out / "config.json")
        if "dtype" in settings:
            config.pop("torch_dtype", None)
        write_json(out / "config.json", updated(config, settings))


def keep_length(tokenizer: Any, adapter: Path) -> None:
    """A classifier's checkpoint cuts texts where its training did: the length travels with the tokenizer."""
    task = (read_settings(adapter) or {}).get("task") or {}
    if task.get("max_length") and task.get("labels"):
        tokenizer.model_max_length = min(tokenizer.model_max_length, task["max_length"])


def updated(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with other values; those of a part's own configuration are put into that."""
    within = {k: updated(config[k], v) for k, v in settings.items() if _is_part(k, config.get(k), v)}
    return {**config, **settings, **within}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What `updated` takes to make one of the other."""
    changed = {k: v for k, v in after.items() if k not in before or before[k] != v}
    return {k: differences(before[k], v) if _is_part(k, before.get(k), v) else v for k, v in changed.items()}


def _is_part(key: str, before: Any, after: Any) -> bool:
    return key.endswith("_config") and isinstance(before, Mapping) and isinstance(after, Mapping)


def copy_licence(base: Path, out: Path) -> None:
    """The licence and the notices of the base."""
    if base.is_dir():
        for name in _files(base):
            if str(name).upper().startswith(_LEGAL):
                shutil.copyfile(base / name, out / name)


def _files(folder: Path) -> Iterator[Path]:
    """Relative to the folder: what is no weight, in it and in the folders that lie in it (1_Pooling/config.json)."""
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = file.name.endswith((*_WEIGHTS, _INDEX)) or file.name == "training_args.bin"
        if file.is_file() and not hidden and not weights and str(name) != _CARD:
            yield name
