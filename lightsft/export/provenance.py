"""Where a merged checkpoint comes from: names, hashes and versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightsft.adapter_files import TENSORS, read_settings
from lightsft.files import sha256

CERTIFICATE = "certificate.json"


def provenance(adapter: Path | None, base: str | Path, *, checked: Path | None = None) -> dict[str, Any]:
    """The merged folders, the adapter's hash and task, the versions; with `checked`, hashes of base and result."""
    found: dict[str, Any] = {
        "base": place_of(base),
        "versions": {name: version(name) for name in ("lightsft", "torch", "transformers", "safetensors")},
    }
    if adapter is not None:
        found |= {"adapter": place_of(adapter), "adapter_sha256": sha256(adapter / TENSORS)}
        found |= {"task": (read_settings(adapter) or {}).get("task")}
    if checked is not None:
        found |= {"checkpoint_sha256": hashes(checked), "base_sha256": hashes(Path(base))}
    return found


def place_of(path_or_id: str | Path) -> str:
    """A folder by its whole path, so that it is found from anywhere; a hub id as it is."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).exists() else str(path_or_id)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights; none where it is no folder."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
