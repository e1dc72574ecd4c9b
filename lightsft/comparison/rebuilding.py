"""A report from what runs have left, without training: of one, or of several joined into a new folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightsft.comparison.joining import join, run_names
from lightsft.comparison.report import write_report
from lightsft.comparison.report.facts import best_trial
from lightsft.comparison.schema import check, read_results
from lightsft.errors import ConfigurationError
from lightsft.files import new_folder, write_json


def rebuild(directories: Sequence[Path], out: Path | None = None) -> tuple[Path, Path]:
    """Write report.md and report.html anew and return their paths, in this order.

    Of one run into its own folder, or into a new folder `out`. Of several, `out` is needed: it gets a results.json with
    the trials of all of them too, summarised again.
    """
    runs = [(directory, read_results(directory)) for directory in directories]
    if len(runs) == 1:
        directory, results = runs[0]
        if out is None:
            return write_report(results, directory)
        with new_folder(out) as folder:
            write_report(results, folder, run=directory)
        return out / "report.md", out / "report.html"
    if out is None:
        raise ConfigurationError(
            f"{len(runs)} runs and no folder for their report", expected="--out with a new folder", todo="add --out"
        )
    joined = join(runs)
    folders = dict(zip(run_names(directories), directories, strict=True))
    with new_folder(out) as folder:
        results = _summarised(joined, folders, folder)
        _move_paths(results, folders, out)
        check(results, out / "results.json")
        write_json(folder / "results.json", results)
        write_report(results, folder)
    return out / "report.md", out / "report.html"


def _summarised(joined: dict[str, Any], folders: dict[str, Path], folder: Path) -> dict[str, Any]:
    """The joined results with summary, comparisons and winner of all their trials.

    `summarise_again` takes them with the folder of each run by its name (`run` of a trial or baseline), below which
    adapters and outcomes lie, and returns them completed. `examples`, where it gives any, is the content of
    examples.json, which becomes a file.
    """
    from lightsft.comparison.summarising import summarise_again

    results: dict[str, Any] = summarise_again(joined, folders)
    examples = results.get("examples")
    if isinstance(examples, dict):
        write_json(folder / "examples.json", examples)
        results["examples"] = "examples.json"
    return results | {"winner": _winner(results)}


def _winner(results: dict[str, Any]) -> dict[str, Any] | None:
    """The first of the summary and its best seed on validation; nothing is merged anew."""
    best = best_trial(results, results["summary"][0]["strategy"]) if results.get("summary") else None
    if best is None:
        return None
    note = "To merge it: lightsft merge, with its folder."
    return {key: best.get(key) for key in ("strategy", "seed", "adapter")} | {"merged": None, "note": note}


def _move_paths(results: dict[str, Any], folders: dict[str, Path], out: Path) -> None:
    """Make paths below the runs' folders paths below `out`."""
    winner = results.get("winner")
    if winner:
        won = best_trial(results, winner["strategy"]) or {}
        winner["adapter"] = _moved(won.get("adapter"), folders.get(won.get("run", "")), out)
    for one, key in [
        *((trial, "adapter") for part in ("trials", "few_shot_trials") for trial in results.get(part) or []),
        *((baseline, "outcomes") for baseline in (results.get("baselines") or {}).values()),
    ]:
        one[key] = _moved(one.get(key), folders.get(one.get("run") or ""), out)


def _moved(path: str | None, folder: Path | None, out: Path) -> str | None:
    if path is None or folder is None:
        return path
    return Path(os.path.relpath(folder.resolve() / path, out.resolve())).as_posix()
