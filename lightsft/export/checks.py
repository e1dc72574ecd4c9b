"""The ways to check a merged checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft.errors import ConfigurationError
from lightsft.export.from_disk import DiskMerge
from lightsft.export.tile_check import check_tiles, require_same_tiles

if TYPE_CHECKING:
    from lightsft.export.held_out import HeldOut

CHECKS = ("auto", "load", "layers", "tiles", "none")
SMALL = 2**30  # bytes of a checkpoint that is loaded to be checked, unless told otherwise
Rows = Callable[[], "HeldOut | None"]


def require_known(check: str) -> None:
    """Raise ConfigurationError for a check that there is not."""
    if check not in CHECKS:
        raise ConfigurationError(f"check={check!r}", expected=f"one of {', '.join(CHECKS)}")


def way_of(check: str, size: int) -> str:
    """The one that "auto" stands for, with a checkpoint of so many bytes."""
    return check if check != "auto" else "load" if size <= SMALL else "tiles"


def checked_on_disk(plan: DiskMerge, folder: Path, way: str) -> dict[str, Any]:
    """What "tiles" or "layers" find; raises MergeError where the checkpoint is another."""
    if way == "tiles":
        return {"check": way, **require_same_tiles(check_tiles(plan, folder))}
    from lightsft.export.certificate import require_passed
    from lightsft.export.layer_check import check_by_layers

    found = check_by_layers(plan, folder)
    require_passed(found, wide=plan.dtype == "float32")
    return {"check": way, **found}


def checked_by_loading(
    folder: Path,
    adapter: Path,
    base: str | None,
    rows: HeldOut | Rows | None,
    dtype: str = "checkpoint",
    *,
    exact: bool = True,
) -> dict[str, Any]:
    """What "load" finds, with the scores on `rows`; raises MergeError where the checkpoint is another."""
    from lightsft.export.certificate import require_passed
    from lightsft.export.loading_check import check_by_loading

    found = check_by_loading(folder, adapter, base, rows() if callable(rows) else rows, dtype, exact=exact)
    require_passed(found, wide=dtype == "float32")
    return {"check": "load", **found}
