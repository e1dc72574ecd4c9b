"""Run folders: run.json says which configuration and which data a folder belongs to, so that it can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.errors import OutputError
from lightsft.files import read_json, require_free, sha256

_DATA = ("data", "validation_data", "test_data")
_FREE = ("out", "jobs", "on", "track")  # where and how fast it runs, not what comes of it


def identity_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same: the configuration, and the bytes of the data files. A folder may be moved."""
    hashes = {name: sha256(Path(path)) for name in _DATA if (path := settings[name]) and Path(path).is_file()}
    return {"settings": {name: value for name, value in settings.items() if name not in _FREE}, "data_sha256": hashes}


def require_same_run(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise OutputError if `out` holds something else than this run."""
    marker = out / "run.json"
    if not marker.exists():
        require_free(out)
        return
    changed = _changes(read_json(marker), identity)
    if changed:
        raise OutputError(
            f"{out} holds another run; it differs in {', '.join(changed)}",
            expected="a new folder, or the same command again to continue that run",
            todo="choose another --out; nothing was changed",
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    then, settings = before.get("settings", {}), now["settings"]
    changed = sorted(key for key in {*then, *settings} if then.get(key) != settings.get(key))
    if before.get("data_sha256") != now["data_sha256"]:
        changed.append("the content of the data file")
    return changed
