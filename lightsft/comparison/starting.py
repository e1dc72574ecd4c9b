"""Everything that can be wrong with a comparison, before hours are spent on it; and what needs no training."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lightsft import registry
from lightsft.backbone import Backbone, load_tokenizer
from lightsft.comparison import search
from lightsft.comparison.baselines import all_baselines
from lightsft.comparison.cautions import NOT_TUNED, ONE_SEED
from lightsft.comparison.measures.energy import energy_source
from lightsft.comparison.trial import Send
from lightsft.config import RunConfig, StrategySpec, build
from lightsft.device import choose_device, dtype_name
from lightsft.errors import ConfigurationError, DataError
from lightsft.files import write_array
from lightsft.injection import Strategy
from lightsft.metrics.units import Unit
from lightsft.runs import identity_of
from lightsft.training.prepared import Prepared, prepare
from lightsft.training.run import load_backbone

FEWEST_EXAMPLES = 30  # of the test split, below which nothing can be concluded
WITHOUT_POINTS = 0.01  # what a margin is by default where a score has no points
PACKAGES = (
    "lightsft", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "scipy", "optuna",
    "scikit-learn",
)  # fmt: skip


def start(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Check data, model and the strategies' options; score the baselines; say what this machine is.

    arguments: config, and the directory that gets baselines/NAME.npy, the outcomes of each.
    """
    config, directory = build(RunConfig, arguments["config"]), Path(arguments["directory"])
    searches = [_search(spec, registry.strategy(spec.name, **spec.options), config) for spec in config.strategies]
    send({"event": "stage", "stage": "reading the data"})
    prepared = prepare(config, examined=True)
    _require_curve(config, prepared)
    if config.score_by is not None and config.score_by not in prepared.splits.test[0]:
        raise DataError(
            f"{config.test_data or config.data} has no column {config.score_by!r} to score by",
            expected=f"one of its columns: {', '.join(map(repr, prepared.splits.test[0]))}",
            todo="name one of them with --score-by",
        )
    send({"event": "stage", "stage": "scoring the baselines"})
    backbone = load_backbone(config, prepared, None, seed=0)
    baselines = _baselines(config, prepared, backbone, directory)
    splits = prepared.splits.named()
    tokenizer = load_tokenizer(config.model, config.task.name)
    return {
        "baselines": baselines,
        "search": searches if config.tune else [],
        "warnings": _warnings(config, prepared),
        "margins": _margins(config, prepared.task.unit(prepared.metric)),
        "task_settings": prepared.task.describe(),
        "data": _data(config, prepared),
        "metric": prepared.metric,
        "greater_is_better": prepared.task.greater_is_better(prepared.metric),
        "unit": prepared.task.unit(prepared.metric).as_json(),
        "hashes": {
            "data": identity_of(config.model_dump(mode="json"))["data_sha256"],
            "splits": {name: _hash([prepared.task.key(row) for row in rows]) for name, rows in splits.items()},
            "model": _hash(backbone.sketch()),
        },
        "previews": {name: prepared.task.preview(rows[0], tokenizer) for name, rows in splits.items()},
        "machine": _machine(config, backbone),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _margins(config: RunConfig, unit: Unit) -> dict[str, float]:
    """In units of the metric: a point, which is 1 of a BLEU and 0.01 of an accuracy; of a loss 0.01; and half of it."""
    point = 1 / unit.scale if unit.name else WITHOUT_POINTS
    return {"margin": config.margin or point, "resolve": config.resolve or point / 2}


def _search(spec: StrategySpec, strategy: Strategy, config: RunConfig) -> dict[str, Any]:
    """The record of a search that has no trials yet."""
    space = search.space_of(spec, strategy, config)
    default = search.defaults(spec, strategy, config, space)
    return {"strategy": spec.label, "space": space, "default": default, "seed": search.SEED, "trials": []}


def _require_curve(config: RunConfig, prepared: Prepared) -> None:
    """A few examples per class need classes, and a class needs as many."""
    if config.few_shot_curve and not any(prepared.task.classes(row) for row in prepared.splits.train):
        raise ConfigurationError(
            f"few_shot_curve={','.join(map(str, config.few_shot_curve))}, and the rows of {prepared.task.name} have no "
            "classes",
            expected="a task with labels",
            todo="leave --few-shot-curve out",
        )


def _baselines(config: RunConfig, prepared: Prepared, backbone: Backbone, directory: Path) -> dict[str, Any]:
    task = prepared.task
    found = all_baselines(task, prepared.splits, backbone, config.evaluation_batch_size, prepared.metric)
    for name, one in found.items():
        write_array(directory / "baselines" / f"{name}.npy", one.test)
    return {
        name: {
            "validation": task.metrics(one.validation),
            "test": task.metrics(one.test),
            "about": one.about,
            "seconds": one.seconds,
            "outcomes": f"baselines/{name}.npy",
        }
        for name, one in found.items()
    }


def _warnings(config: RunConfig, prepared: Prepared) -> list[str]:
    """What limits conclusions, whatever the scores will be."""
    test, task = prepared.splits.test, prepared.task
    found = []
    if len(test) < FEWEST_EXAMPLES:
        found.append(
            f"The test split has {len(test)} examples: nothing can be concluded from it. With {FEWEST_EXAMPLES} to "
            "some hundred, only large differences show."
        )
    if len({task.classes(row) for row in test}) == 1 and any(task.classes(row) for row in test):
        found.append(
            f"Every test example is of the class {', '.join(task.classes(test[0]))}: nothing can be concluded from the "
            "test split."
        )
    if config.seeds == 1:
        found.append(ONE_SEED)
    if config.tune == 0:
        found.append(NOT_TUNED)
    return found


def _data(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    return {
        **{name: len(rows) for name, rows in prepared.splits.named().items()},
        "labels": list(getattr(prepared.task, "labels", ())),
        "notes": prepared.lines(),
        "dropped": prepared.dropped,
        "findings": [finding.as_json() for finding in prepared.findings],
        "finding_lines": prepared.finding_lines(),
        "source": config.data,
        **({"groups": {"column": config.score_by}} if config.score_by else {}),
    }


def _machine(config: RunConfig, backbone: Backbone) -> dict[str, Any]:
    device = choose_device(config.device)
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
        "dtype": dtype_name(backbone.compute_dtype),
        "energy": energy_source(device),
        **({} if backbone.quantization is None else {"quantization": backbone.quantization}),
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
