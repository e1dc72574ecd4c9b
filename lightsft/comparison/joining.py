"""Several runs over the same splits as one: their trials side by side, ready to be summarised again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightsft.comparison.schema import SCHEMA
from lightsft.errors import OutputError

Run = tuple[Path, Mapping[str, Any]]  # a folder and what its results.json holds
SAME = ("task", "metric", "greater_is_better")
OF_EACH_RUN = frozenset(
    ("out", "strategies", "seeds", "model", "data", "validation_data", "test_data", "check_data")
)  # keys in which runs of one setting may differ
OF_THE_DATA = frozenset(("majority", "tfidf"))  # baselines that no model has a part in


def join(runs: Sequence[Run]) -> dict[str, Any]:
    """One results.json of several, without what has to be computed again (summary, comparisons, winner).

    Each trial and baseline gets `run`, the name of its folder among `run_names`, and keeps its paths below it.
    A label that two runs trained with different settings gets that name added: `lora [wide]`. The same setting and seed
    in two runs is taken from the first, with a warning. OutputError if task, metric or splits differ.
    """
    _require_same(runs)
    names, labels = run_names([folder for folder, _ in runs]), _labels(runs)
    first = runs[0][1]
    together: dict[str, Any] = {
        "schema": SCHEMA,
        "joined": [str(folder) for folder, _ in runs],
        "model": "; ".join(dict.fromkeys(str(results["model"]) for _, results in runs)),
        "command": "\n".join(dict.fromkeys(str(results["command"]) for _, results in runs)),
        "config": {name: results["config"] for name, (_, results) in zip(names, runs, strict=True)},
        "machine": _common([results.get("machine") or {} for _, results in runs]),
        "versions": _common([results.get("versions") or {} for _, results in runs]),
    }
    together |= {
        key: first[key]
        for key in (*SAME, "unit", "hashes", "data", "previews", "task_settings", "margins")
        if key in first
    }
    for key in ("skipped", "search", "few_shot"):
        together[key] = [
            {**one, "strategy": label(str(one.get("strategy")))}
            for (_, results), label in zip(runs, labels, strict=True)
            for one in results.get(key) or []
        ]
    together["trials"], repeated = _trials("trials", runs, names, labels)
    together["few_shot_trials"], _ = _trials("few_shot_trials", runs, names, labels)
    together["baselines"] = _baselines(runs, names)
    warnings = [text for _, results in runs for text in results.get("warnings") or []]
    together["warnings"] = [*dict.fromkeys(warnings), *repeated, *_differences(runs)]
    return together


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise OutputError(
        f"{', '.join(map(str, folders))}: the same folder is named twice",
        expected="each run once",
        todo="leave one out",
    )


def _require_same(runs: Sequence[Run]) -> None:
    """Raise OutputError with everything that keeps the runs apart."""
    (folder, first), *others = runs
    problems = []
    for other, results in others:
        for key in SAME:
            if results.get(key) != first.get(key):
                problems.append(f"{key}: {first.get(key)!r} in {folder}, {results.get(key)!r} in {other}")
        problems += _split_problems(folder, _splits(first), other, _splits(results))
    if problems:
        raise OutputError(
            "these runs cannot be joined:\n  " + "\n  ".join(problems),
            expected="runs of one task and metric over the same splits",
            todo="report them apart, or run one again with the other's data and split options",
        )


def _splits(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return (results.get("hashes") or {}).get("splits") or {}


def _split_problems(folder: Path, one: Mapping[str, Any], other: Path, two: Mapping[str, Any]) -> list[str]:
    empty = [str(place) for place, splits in ((folder, one), (other, two)) if not splits]
    if empty:
        return [f"{place} has no hashes of its splits" for place in empty]
    names = [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    return [f"the rows of {name} differ between {folder} and {other}" for name in names]


def _labels(runs: Sequence[Run]) -> list[Callable[[str], str]]:
    """For each run what its labels become."""
    names = run_names([folder for folder, _ in runs])
    settings: dict[str, set[str]] = {}
    for _, results in runs:
        for label in _own_labels(results):
            settings.setdefault(label, set()).add(_setting(results, label))

    def renamed(name: str, results: Mapping[str, Any]) -> Callable[[str], str]:
        own = _own_labels(results)
        return lambda label: f"{label} [{name}]" if label in own and len(settings[label]) > 1 else label

    return [renamed(name, results) for name, (_, results) in zip(names, runs, strict=True)]


def _own_labels(results: Mapping[str, Any]) -> set[str]:
    return {str(trial["strategy"]) for trial in results["trials"]}


def _setting(results: Mapping[str, Any], label: str) -> str:
    """All that a strategy's trials of one seed depend on, but for the seed."""
    config = results["config"]
    specs = [spec for spec in config.get("strategies") or [] if isinstance(spec, dict) and spec.get("label") == label]
    trials = [trial for trial in results["trials"] if trial["strategy"] == label]
    own = {json.dumps([trial.get("parameters"), trial.get("options")], sort_keys=True) for trial in trials}
    rest = {key: value for key, value in config.items() if key not in OF_EACH_RUN}
    return json.dumps([_model(results), rest, specs, sorted(own)], sort_keys=True, default=str)


def _model(results: Mapping[str, Any]) -> str:
    """What tells the base from another: the hash of its weights' sketch, or else its name."""
    return str((results.get("hashes") or {}).get("model") or results["model"])


def _trials(
    part: str, runs: Sequence[Run], names: Sequence[str], labels: Sequence[Callable[[str], str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """All trials of a part, each strategy's together; and what to say of those that two runs have."""
    kept: dict[tuple[str, Any, Any], dict[str, Any]] = {}
    repeated: dict[str, list[str]] = {}
    for (_, results), name, label in zip(runs, names, labels, strict=True):
        for trial in results.get(part) or []:
            one = {**trial, "strategy": label(trial["strategy"]), "run": name}
            which = (one["strategy"], one.get("shots"), one.get("seed"))
            known = kept.get(which)
            if known is None or (known["status"] != "finished" and one["status"] == "finished"):
                kept[which] = one
            elif one["status"] == "finished":
                repeated.setdefault(name, []).append(f"{one['strategy']} seed {one.get('seed')}")
    order = list(dict.fromkeys(strategy for strategy, _, _ in kept))
    trials = sorted(kept.values(), key=lambda one: (order.index(one["strategy"]), one.get("seed") or 0))
    said = [f"{', '.join(which)} of {name}: left out, an earlier run has the same" for name, which in repeated.items()]
    return trials, said


def _baselines(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """Baselines by name; those of different models with the name of the run added."""
    models = {_model(results) for _, results in runs}
    found: dict[str, Any] = {}
    for (_, results), name in zip(runs, names, strict=True):
        for baseline, scores in (results.get("baselines") or {}).items():
            own = baseline if len(models) == 1 or baseline in OF_THE_DATA else f"{baseline} [{name}]"
            found.setdefault(own, {**scores, "run": name})
    return found


def _common(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs have the same; of the rest, every value."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    values = {key: list(dict.fromkeys(str(mapping[key]) for mapping in mappings if key in mapping)) for key in keys}
    first = {key: next(mapping[key] for mapping in mappings if key in mapping) for key in keys}
    return {key: first[key] if len(values[key]) == 1 else " or ".join(values[key]) for key in keys}


def _differences(runs: Sequence[Run]) -> list[str]:
    """What makes figures of different runs hard to compare."""
    said = {
        "machine": "The runs were made on different machines: compare their costs with care.",
        "versions": "The runs were made with different versions of packages.",
    }
    found = {key: {json.dumps(results.get(key) or {}, sort_keys=True) for _, results in runs} for key in said}
    return [text for key, text in said.items() if len(found[key]) > 1]
