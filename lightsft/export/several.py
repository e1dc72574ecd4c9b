"""Several adapters merged into one checkpoint, from disk to disk; see `lightsft.export.combining` for the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft.adapter_files import TENSORS
from lightsft.errors import ConfigurationError
from lightsft.export.combining import combine
from lightsft.export.combining_checks import check_options
from lightsft.export.from_disk import DiskMerge, from_disk
from lightsft.export.layout import entries
from lightsft.export.provenance import place_of
from lightsft.files import sha256
from lightsft.low_rank import LowRank
from lightsft.row_changes import Values

if TYPE_CHECKING:
    from lightsft.row_changes import RowChange, Values


@dataclass(frozen=True)
class Combination:
    """Adapter folders, the weight of each, and how they are put together (`combine` says what the options mean)."""

    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    method: str = "linear"
    density: float | None = None
    majority: str = "total"
    seed: int = 0

    def described(self) -> dict[str, Any]:
        """For the certificate."""
        folders = zip(self.adapters, self.weights, strict=True)
        own = [{"adapter": place_of(f), "sha256": sha256(f / TENSORS), "weight": weight} for f, weight in folders]
        options = {"method": self.method, "density": self.density, "majority": self.majority, "seed": self.seed}
        return {"adapters": own, **options}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Combination:
        """What `described` gave."""
        folders = tuple(Path(one["adapter"]) for one in described["adapters"])
        weights = tuple(float(one["weight"]) for one in described["adapters"])
        options = {name: described[name] for name in ("method", "density", "majority", "seed")}
        return cls(folders, weights, **options)


def combined_from_disk(
    combination: Combination, base: str | None, *, dtype: str = "checkpoint", max_shard_size: int | None = None
) -> DiskMerge:
    """The merge of all of them into one base.

    Raises ConfigurationError for one that does more than add low-rank changes to stored weights, or was trained on
    another base than the first; what `from_disk` and `combine` raise.
    """
    options = combination.weights, combination.method, combination.density, combination.majority
    check_options(len(combination.adapters), *options)
    plans = [from_disk(folder, base, dtype=dtype, max_shard_size=max_shard_size) for folder in combination.adapters]
    changes = [_low_rank(plan, folder) for plan, folder in zip(plans, combination.adapters, strict=True)]
    first = plans[0]
    assert first is not None
    for plan, folder in zip(plans, combination.adapters, strict=True):
        if plan is not None and plan.checkpoint.folder.resolve() != first.checkpoint.folder.resolve():
            raise ConfigurationError(
                f"{folder} was trained on {plan.checkpoint.folder}, the first one on {first.checkpoint.folder}",
                expected="adapters of one base",
                todo="name the base with --base, if both are the same model",
            )
    together: dict[str, RowChange] = combine(
        changes,
        combination.weights,
        combination.method,
        density=combination.density,
        majority=combination.majority,
        seed=combination.seed,
    )
    return replace(first, adapter=None, entries=entries(first.checkpoint, together))


def _low_rank(plan: DiskMerge | None, folder: Path) -> dict[str, LowRank]:
    made = {} if plan is None else plan.entries
    changes = {name: entry.change for name, entry in made.items() if entry.change is not None}
    found = {name: change for name, change in changes.items() if isinstance(change, LowRank)}
    if plan is None or plan.settings or len(found) < len(changes):
        others = sorted(set(changes) - set(found))[:3]
        named = f": {', '.join(others)}" if others else ""
        whole = any(isinstance(changes[name], Values) for name in others)
        raise ConfigurationError(
            f"{folder} does more than add low-rank changes to stored weights{named}",
            expected="LoRA, DoRA, PiSSA or VeRA folders on a base that is a folder of safetensors",
            todo="make it a LoRA first: lightsft convert FOLDER --to lora --out OTHER"
            + ("; task heads, which stay whole, cannot be put together" if whole else ""),
        )
    return found
