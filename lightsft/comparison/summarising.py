"""What trials show together: a row per strategy, every two of them compared, the cheapest that is good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightsft.comparison.measures.per_example import examples
from lightsft.comparison.statistics import Measured, analyse
from lightsft.config import RunConfig, build
from lightsft.data.reading import Row
from lightsft.errors import LightsftError
from lightsft.tasks import Task, task
from lightsft.tasks.base import Array
from lightsft.training.prepared import prepare

Results = dict[str, Any]
Folders = Mapping[Any, Path]  # of each run by its name; of the only one by None

COSTS = ("trainable_parameters", "peak_bytes", "seconds", "adapter_bytes")
MEDIANS = (
    "seconds", "training_seconds", "peak_bytes", "adapter_bytes", "tokens_per_second", "seconds_to_target", "joules",
)  # fmt: skip


def summarise_again(results: Mapping[str, Any], folders: Folders) -> Results:
    """`results` with summary, comparisons, non_inferior, few_shot and examples of the trials and baselines in it.

    Outcomes are read from the folders of the runs, by the name (`run`) that each trial and baseline has. `examples` is
    the content of examples.json; it is left out where the rows cannot be read any more.
    """
    chosen = task(**results["task_settings"])
    found: Results = {**results, "summary": [], "comparisons": [], "non_inferior": None, "few_shot": []}
    trials = _finished(results["trials"])
    if not trials:
        return found
    outcomes = {label: [_outcomes(one, folders) for one in rows] for label, rows in trials.items()}
    baselines = {
        name: np.load(folders[one.get("run")] / one["outcomes"])
        for name, one in sorted((results.get("baselines") or {}).items())
        if one.get("outcomes")
    }
    rows = _ranked([_row(label, of, results) for label, of in trials.items()], results)
    metric = results["metric"]
    measured = [
        Measured(
            label,
            tuple(one["seed"] for one in trials[label]),
            outcomes[label],
            lambda drawn: chosen.score(drawn, metric),
            {name: row.get(name) for name in COSTS for row in rows if row["strategy"] == label},
        )
        for label in trials
    ]
    measured += [
        Measured(name, (0,), [one], lambda drawn: chosen.score(drawn, metric), baseline=True)
        for name, one in baselines.items()
    ]
    settings = {key: results["margins"][key] for key in ("resolve", "margin")}
    unit = chosen.unit(metric)
    greater = bool(results["greater_is_better"])
    analysis = analyse(measured, best=rows[0]["strategy"], greater_is_better=greater, unit=unit, **settings)
    found["unit"] = unit.as_json()
    found["summary"] = [{**row, **analysis.estimates[row["strategy"]].as_json()} for row in rows]
    found["comparisons"] = [one.as_json() for one in analysis.comparisons]
    found["non_inferior"] = analysis.non_inferior.as_json()
    found["warnings"] = list(dict.fromkeys([*(results.get("warnings") or []), *analysis.warnings]))
    found["few_shot"] = _few_shot(results, folders, chosen)
    test = _test_rows(results)
    if test is not None and len(test) == len(next(iter(outcomes.values()))[0]):
        found["examples"] = examples(chosen, test, outcomes, metric)
    return found


def _finished(trials: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The trials that ended well, by strategy, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        if trial["status"] == "finished":
            found.setdefault(trial["strategy"], []).append(trial)
    return found


def _outcomes(trial: Mapping[str, Any], folders: Folders) -> Array:
    loaded: Array = np.load(folders[trial.get("run")] / trial["adapter"] / ".." / "outcomes.npy")
    return loaded


def _row(label: str, trials: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, Any]:
    """What a strategy costs and how its parts scored; score and interval come from the analysis."""
    metric, first = results["metric"], trials[0]
    examined = next((trial for trial in trials if trial.get("latency")), {})
    latency = examined.get("latency") or {}
    forgotten = [one["after"] - one["before"] for trial in trials if (one := trial.get("forgetting"))]
    return {
        "strategy": label,
        "validation_score": float(np.mean([trial["validation"][metric] for trial in trials])),
        "trainable_parameters": first["trainable_parameters"],
        "trainable_share": first["trainable_parameters"] / first["total_parameters"],
        "mergeable": first["mergeable"],
        "learning_rate": first["learning_rate"],
        "parameters": first.get("parameters") or {},
        **{name: _median([trial.get(name) for trial in trials]) for name in MEDIANS},
        "latency_ms": (latency.get("adapter") or {}).get("median_ms"),
        "merged_latency_ms": (latency.get("merged") or {}).get("median_ms"),
        "robustness": _means([trial.get("robustness") for trial in trials], metric),
        "calibration": {
            name: float(np.mean([one[name] for trial in trials if (one := trial.get("calibration"))]))
            for name in ("ece", "ece_after_temperature")
        }
        if any(trial.get("calibration") for trial in trials)
        else None,
        "forgetting": float(np.mean(forgotten)) if forgotten else None,
        "groups": _means([trial.get("groups") for trial in trials], metric),
    }


def _median(values: Sequence[float | None]) -> float | None:
    """Of the values there are; None where one is missing, as where a target was not always reached."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known and len(known) == len(values) else None


def _means(measured: Sequence[Mapping[str, Mapping[str, Any]] | None], metric: str) -> dict[str, float | None] | None:
    """The mean of a metric over seeds, for each kind that was measured."""
    known = [one for one in measured if one]
    if not known:
        return None
    found: dict[str, float | None] = {}
    for kind in known[0]:
        scores = [score for one in known if kind in one and (score := one[kind].get(metric)) is not None]
        found[kind] = float(np.mean(scores)) if scores else None
    return found


def _ranked(rows: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Best validation score first; among equals, the one that trains less."""
    sign = -1 if results["greater_is_better"] else 1
    return sorted(rows, key=lambda row: (sign * row["validation_score"], row["trainable_parameters"]))


def _few_shot(results: Mapping[str, Any], folders: Folders, chosen: Task) -> list[dict[str, Any]]:
    """Scores by examples per class; with all of them last."""
    found, metric = [], results["metric"]
    for shots in sorted({trial["shots"] for trial in results.get("few_shot_trials") or ()}):
        part = [trial for trial in results["few_shot_trials"] if trial["shots"] == shots]
        for label, trials in _finished(part).items():
            outcomes = [_outcomes(trial, folders) for trial in trials]
            seeds = tuple(trial["seed"] for trial in trials)
            measured = Measured(label, seeds, outcomes, lambda drawn: chosen.score(drawn, metric))
            one = analyse([measured], best=label, unit=chosen.unit(metric)).estimates[label].as_json()
            found.append({"strategy": label, "examples": shots, **{k: one[k] for k in ("score", "interval", "seeds")}})
    return found


def _test_rows(results: Mapping[str, Any]) -> list[Row] | None:
    """The test split, where the data is still there; of joined runs, of the first whose data is."""
    config = results["config"]
    for one in config.values() if results.get("joined") else [config]:
        try:
            return prepare(build(RunConfig, {**one, "track": ()})).splits.test
        except LightsftError:
            continue
    return None
