"""Repeat the check of a merged checkpoint: against the base and the adapter that its certificate names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft.adapter_files import is_adapter
from lightsft.errors import ArtifactError, ConfigurationError, MergeError
from lightsft.export.checks import checked_by_loading, checked_on_disk, require_known, way_of
from lightsft.export.from_disk import from_disk
from lightsft.export.provenance import CERTIFICATE, provenance
from lightsft.export.several import Combination, combined_from_disk
from lightsft.export.tile_check import check_tiles, require_same_tiles
from lightsft.files import read_json
from lightsft.schemes import BASE

if TYPE_CHECKING:
    from lightsft.export.checks import Rows


def verify(
    folder: Path,
    *,
    adapter: str | Path | None = None,
    base: str | None = None,
    check: str = "auto",
    rows: Rows | None = None,
) -> dict[str, Any]:
    """What the check finds now, with the hashes of base, adapter and result.

    `adapter` and `base` are where they are now, by default where they were then. Raises ArtifactError if the folder has
    no certificate or one of the three is gone, MergeError if a file is another than the certificate says, or if the
    checkpoint differs from base + adapter.
    """
    require_known(check)
    then = _certificate(folder)
    if "adapters" in then:
        return _of_several(folder, then, base, check)
    source, place = base or str(then["base"]), Path(adapter or then["adapter"])
    if not is_adapter(place):
        raise ArtifactError(
            f"no adapter in {place}, where it was when it was merged",
            expected="the adapter folder",
            todo="name where it is now: --adapter FOLDER",
        )
    now = provenance(place, source, checked=folder)
    _require_same_files(folder, then, now)
    return {**_found(folder, place, source, then, check, rows), **now}


def _of_several(folder: Path, then: dict[str, Any], base: str | None, check: str) -> dict[str, Any]:
    source = base or str(then["base"])
    combination = Combination.read(then)
    now = provenance(None, source, checked=folder) | combination.described()
    if [one["sha256"] for one in then["adapters"]] != [one["sha256"] for one in now["adapters"]]:
        raise MergeError(
            f"the adapters changed since {folder / CERTIFICATE} was written",
            expected="the files that were merged and checked then",
            todo="merge again",
        )
    if check == "none":
        return {"check": check, "passed": None, **now}
    plan = combined_from_disk(combination, source, dtype=str(then["dtype"]))
    return {"check": "tiles", **require_same_tiles(check_tiles(plan, folder)), **now}


def certified_adapter(folder: Path) -> Path:
    """Where the adapter was when it was merged into this folder."""
    return Path(_certificate(folder)["adapter"])


def _certificate(folder: Path) -> dict[str, Any]:
    file = folder / CERTIFICATE
    found = read_json(file) if file.is_file() else None
    if not isinstance(found, dict) or not ({"base", "onto"} <= found.keys() and {"adapter", "adapters"} & found.keys()):
        raise ArtifactError(
            f"{folder} holds no {CERTIFICATE} that names its base and its adapter",
            expected="a folder written by lightsft merge",
            todo="check the path",
        )
    return found


def _require_same_files(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse files that changed since the certificate was written."""
    wrong = ["the adapter"] if then.get("adapter_sha256") != now["adapter_sha256"] else []
    for kind, what in (("checkpoint_sha256", "the result's"), ("base_sha256", "the base's")):
        before, after = then.get(kind) or {}, now[kind]
        wrong += [f"{what} {name}" for name in sorted(before) if after.get(name) != before[name]]
    if wrong:
        raise MergeError(
            f"{', '.join(wrong)} changed since {folder / CERTIFICATE} was written, or is gone",
            expected="the files that were merged and checked then",
            todo="merge again, or name the right ones with --adapter and --base",
        )


def _found(
    folder: Path, adapter: Path, base: str, then: dict[str, Any], check: str, rows: Rows | None
) -> dict[str, Any]:
    dtype = str(then.get("dtype", "checkpoint"))
    plan = from_disk(adapter, base, dtype=dtype) if then["onto"] == BASE else None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    way = "load" if check == "auto" and plan is None else way_of(check, size)
    if way == "none":
        return {"check": way, "passed": None}
    if way == "load":
        exact = then["onto"] == BASE
        return checked_by_loading(folder, adapter, base, rows, dtype, exact=exact)
    if plan is None:
        raise ConfigurationError(
            f"check={way!r} of a checkpoint that was merged through the model in memory",
            expected="one that was merged from disk to disk",
            todo="--check load",
        )
    return checked_on_disk(plan, folder, way)
