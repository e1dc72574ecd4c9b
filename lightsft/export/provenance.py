"""Where a merged checkpoint comes from: names, hashes and versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightsft.adapter_files import TENSORS
from lightsft.files import sha256

CERTIFICATE = "certificate.json"


def provenance(adapter: Path, base: str | Path, *, checked: Path | None = None) -> dict[str, Any]:
    """The folders that were merged, the adapter's hash, the versions; with `checked`, hashes of base and result too."""
    found: dict[str, Any] = {
        "base": str(base),
        "adapter": str(adapter),
        "adapter_sha256": sha256(adapter / TENSORS),
        "versions": {name: version(name) for name in ("lightsft", "torch", "transformers", "safetensors")},
    }
    if checked is not None:
        found |= {"checkpoint_sha256": hashes(checked), "base_sha256": hashes(Path(base))}
    return found


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights; none where it is no folder."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
