"""Merge a saved strategy into its base: a plain checkpoint, from disk to disk where that can be, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft.adapter_files import TENSORS, is_adapter
from lightsft.errors import ArtifactError, ConfigurationError
from lightsft.export.checks import Rows, checked_by_loading, checked_on_disk, require_known, way_of
from lightsft.export.from_disk import DTYPES, DiskMerge, from_disk, require_place
from lightsft.export.model_card import write_card
from lightsft.export.pooling import write_pooling
from lightsft.export.provenance import CERTIFICATE, provenance
from lightsft.export.rounding import MOST_ROUNDING, require_little, total
from lightsft.export.several import Combination, combined_from_disk
from lightsft.files import new_folder, require_free, write_json
from lightsft.loading_memory import given_back
from lightsft.schemes import BASE, ORIGINAL, SCHEMES

if TYPE_CHECKING:
    from lightsft.export.held_out import HeldOut

Report = Callable[[int, int], object]  # is told how many bytes more are written, and of how many


def merge(
    adapter_dir: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    out: str | Path,
    dtype: str = "checkpoint",
    onto: str = BASE,
    most_rounding: float = MOST_ROUNDING,
    correction_rank: int = 0,
    data: str | Path | None = None,
    encoding: str = "utf-8",
    check: str = "auto",
    max_shard_size: int | None = None,
    streaming: bool = True,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    density: float | None = None,
) -> Path:
    """Write the merged checkpoint to `out` with its certificate.json; returns `out`.

    `base` defaults to where the strategy was trained from. The checkpoint keeps the base's own type unless `dtype`
    names another: fp32 arithmetic and one rounding. It is written from disk to disk, in little memory, where the
    names in both folders say what to do (LoRA and DoRA beside layers); otherwise, and with streaming=False, through
    the model in memory. `max_shard_size` in bytes.

    For a strategy that was trained beside codes, `onto` chooses what it is added to: "base" (the dequantized weights,
    which is what was trained), "original" (the weights that the codes were made of), or codes again: "int8", "nf4",
    "fp4". With those, `correction_rank` fits a LoRA to what the codes lose and writes it to `out`/correction.

    `check`: "load" (plain transformers, in a process of its own, against base + adapter), for checkpoints too large to
    load "layers" (the same, a layer at a time from disk) and "tiles" (rows recomputed in fp64 from disk), "none", or
    "auto": "load" up to 1 GiB, "tiles" above. Loaded, the
    certificate holds the score before and after on rows of `data` (in `encoding`); without it, on the test split of
    the run that `adapter_dir` is of, where its data is still there.

    Several adapters of one base are merged together: with `weights` (1 each by default), by `method` "linear" (task
    arithmetic), "ties", "dare_linear" or "dare_ties", of which the last three keep the share `density` of the values.

    Raises MergeError if the strategy does not merge, if storing the weights loses more than `most_rounding` of what was
    trained, or if the checkpoint differs from base + adapter; OutputError if `out` holds something, or the disk has no
    room. Only what passed is left there.
    """

    if not isinstance(adapter_dir, str | Path):
        folders = tuple(map(Path, adapter_dir))
        several = Combination(folders, tuple(weights or [1.0] * len(folders)), method, density)
        merge_several(
            several,
            Path(out),
            base=None if base is None else str(base),
            dtype=dtype,
            most_rounding=most_rounding,
            check=check,
            max_shard_size=max_shard_size,
        )
        return Path(out)

    def rows() -> HeldOut | None:
        from lightsft.export.held_out import held_out

        return held_out(Path(adapter_dir), None if data is None else str(data), encoding)

    merge_folder(
        Path(adapter_dir),
        Path(out),
        base=None if base is None else str(base),
        rows=rows,
        dtype=dtype,
        onto=onto,
        most_rounding=most_rounding,
        correction_rank=correction_rank,
        check=check,
        max_shard_size=max_shard_size,
        streaming=streaming,
    )
    return Path(out)


def merge_folder(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    rows: HeldOut | Rows | None = None,
    dtype: str = "checkpoint",
    onto: str = BASE,
    most_rounding: float = MOST_ROUNDING,
    correction_rank: int = 0,
    check: str = "auto",
    max_shard_size: int | None = None,
    streaming: bool = True,
    report: Report | None = None,
) -> dict[str, Any]:
    """Merge, check on `rows` (on random tokens without), write; returns the certificate."""
    require_free(out)
    _require_known(onto, dtype, correction_rank, check, max_shard_size)
    if not is_adapter(adapter):
        raise ArtifactError(
            f"{adapter} holds no {TENSORS}" if adapter.is_dir() else f"no folder {adapter}",
            expected="an adapter folder written by lightsft or PEFT",
            todo="check the path",
        )
    if streaming and onto == BASE:
        with given_back(str(adapter)):  # its file is mapped: whole deltas are as large as the base
            plan = from_disk(adapter, base, dtype=dtype, max_shard_size=max_shard_size)
            if plan is not None:
                return _merge_from_disk(plan, out, base, rows, most_rounding, check, report)
    from lightsft.export.in_memory import merge_in_memory

    return merge_in_memory(
        adapter,
        out,
        base=base,
        rows=rows() if callable(rows) else rows,
        dtype=dtype,
        onto=onto,
        most_rounding=most_rounding,
        correction_rank=correction_rank,
        max_shard_size=max_shard_size,
    )


def merge_several(
    combination: Combination,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "checkpoint",
    most_rounding: float = MOST_ROUNDING,
    check: str = "auto",
    max_shard_size: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Merge several adapters into their base, from disk to disk; returns the certificate."""
    require_free(out)
    _require_known(BASE, dtype, 0, check, max_shard_size)
    if check in ("load", "layers"):
        raise ConfigurationError(
            f"check={check!r} of several adapters", expected="tiles or none: no single strategy is what was merged"
        )
    plan = combined_from_disk(combination, base, dtype=dtype, max_shard_size=max_shard_size)
    way = "tiles" if check == "auto" else check
    return _merge_from_disk(plan, out, base, None, most_rounding, way, report, combination.described())


def _merge_from_disk(
    plan: DiskMerge,
    out: Path,
    base: str | None,
    rows: HeldOut | Rows | None,
    most_rounding: float,
    check: str,
    report: Report | None,
    combination: dict[str, Any] | None = None,
) -> dict[str, Any]:
    files = plan.files
    size = sum(file.size for file in files)
    require_place(out, plan.checkpoint.folder, size)
    with new_folder(out) as folder:
        lost = plan.write(files, folder, None if report is None else lambda written: report(written, size))
        require_little(lost, most_rounding, "nothing was written; merge in full precision: --dtype float32")
        certificate: dict[str, Any] = {
            "onto": BASE,
            "dtype": plan.dtype or "checkpoint",
            "written": "from disk to disk",
            "rounding": total(lost).as_json(),
            "rounding_by_weight": [row.as_json() for row in lost],
        }
        certificate |= _checked(plan, folder, base, rows, check, size)
        loaded = folder if certificate["check"] == "load" else None
        certificate |= provenance(plan.adapter, plan.checkpoint.folder, checked=loaded) | (combination or {})
        write_json(folder / CERTIFICATE, certificate)
        if plan.adapter is not None:
            write_pooling(folder, plan.adapter)
        write_card(folder, certificate)
    return certificate


def _checked(
    plan: DiskMerge, folder: Path, base: str | None, rows: HeldOut | Rows | None, check: str, size: int
) -> dict[str, Any]:
    """What the chosen check found; raises MergeError where it found something."""
    way = way_of(check, size)
    if way == "none":
        return {"check": way, "passed": None}
    if way != "load":
        return checked_on_disk(plan, folder, way)
    assert plan.adapter is not None
    return checked_by_loading(folder, plan.adapter, base, rows, plan.dtype or "checkpoint")


def _require_known(onto: str, dtype: str, correction_rank: int, check: str, max_shard_size: int | None) -> None:
    require_known(check)
    if dtype not in ("checkpoint", *DTYPES):
        raise ConfigurationError(f"dtype={dtype!r}", expected=f"one of checkpoint, {', '.join(DTYPES)}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ConfigurationError(f"max_shard_size={max_shard_size}", expected="a number of bytes, at least 1")
    if onto not in (BASE, ORIGINAL, *SCHEMES):
        raise ConfigurationError(f"onto={onto!r}", expected=f"one of {', '.join((BASE, ORIGINAL, *SCHEMES))}")
    if correction_rank and onto not in SCHEMES:
        raise ConfigurationError(
            f"a correction of rank {correction_rank} onto {onto}",
            expected=f"codes, which lose something: {', '.join(SCHEMES)}",
            todo="leave --correction-rank out",
        )
    if dtype != "checkpoint" and onto in SCHEMES:
        raise ConfigurationError(
            f"dtype={dtype!r} onto {onto}",
            expected="the type that the base is kept in, for what is not in codes",
            todo="leave --dtype out",
        )
