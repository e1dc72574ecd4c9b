"""What runs in a worker's children: preparing with baselines, one trial, the summary, the merge.

Importing this module imports everything a trial needs, and computes nothing. Each job takes plain JSON values and a
function that sends progress events, and returns plain JSON values.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import transformers

from lightsft import adapter_files, artifact, registry
from lightsft.backbone import load_tokenizer
from lightsft.comparison.memory import PeakMemory
from lightsft.comparison.statistics import interval
from lightsft.config import RunConfig, StrategySpec, build
from lightsft.device import choose_device, choose_dtype, dtype_name
from lightsft.export.held_out import HeldOut
from lightsft.export.merge import merge_folder
from lightsft.files import disk_errors, write_file
from lightsft.tasks.base import Metrics
from lightsft.training.evaluate import score_model
from lightsft.training.prepared import Prepared, prepare
from lightsft.training.run import build_trainer, load_backbone

Send = Callable[[dict[str, Any]], None]
PACKAGES = (
    "lightsft",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "scipy",
)


def start(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Check data, model and every strategy's name and options; score the baselines; say what this machine is."""
    config = build(RunConfig, arguments["config"])
    for spec in config.strategies:
        registry.strategy(spec.name, **spec.options)
    send({"event": "stage", "stage": "reading the data"})
    prepared = prepare(config, examined=True)
    device = choose_device(config.device)
    dtype = dtype_name(choose_dtype(config.dtype, device))
    send({"event": "stage", "stage": "scoring the untuned model"})
    baselines, how = _baselines(config, prepared)
    tokenizer = load_tokenizer(config.model, config.task.name)
    return {
        "baselines": baselines,
        "data": {
            **{name: len(rows) for name, rows in prepared.splits.named().items()},
            "labels": list(getattr(prepared.task, "labels", ())),
            "notes": prepared.lines(),
            "dropped": prepared.dropped,
            "findings": [finding.as_json() for finding in prepared.findings],
            "finding_lines": prepared.finding_lines(),
            "source": config.data,
        },
        "metric": prepared.metric,
        "greater_is_better": prepared.task.greater_is_better(prepared.metric),
        "previews": {name: prepared.task.preview(rows[0], tokenizer) for name, rows in prepared.splits.named().items()},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "device": str(device),
            "dtype": dtype,
            **({} if how is None else {"quantization": how}),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _baselines(config: RunConfig, prepared: Prepared) -> tuple[dict[str, dict[str, Metrics]], str | None]:
    """Scores without training, and how the base is quantized."""
    backbone = load_backbone(config, prepared, None, seed=0)
    splits = {"validation": prepared.splits.validation, "test": prepared.splits.test}
    baselines = {
        "untuned": {
            name: score_model(backbone, prepared.task, rows, config.evaluation_batch_size)
            for name, rows in splits.items()
        }
    }
    constant = {name: prepared.task.baseline(prepared.splits.train, rows) for name, rows in splits.items()}
    found = {name: metrics for name, metrics in constant.items() if metrics is not None}
    return baselines | ({"majority": found} if found else {}), backbone.quantization


def trial(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train one strategy with one seed, score it, save it; everything it leaves is in its own folder."""
    config = build(RunConfig, arguments["config"])
    spec, seed = StrategySpec(**arguments["spec"]), int(arguments["seed"])
    directory = Path(arguments["directory"])
    prepared = prepare(config)
    memory = PeakMemory(choose_device(config.device))
    strategy = registry.strategy(spec.name, **spec.options)
    backbone = load_backbone(config, prepared, strategy, seed)
    injection = strategy.inject(backbone, seed=seed)
    trainer = build_trainer(
        config,
        prepared,
        injection,
        learning_rate=spec.learning_rate,
        seed=seed,
        directory=directory / "checkpoints",
        resumable=False,
        callbacks=[_Reporter(send)],
    )
    began = time.perf_counter()
    with disk_errors(directory):
        trainer.train()
    seconds = time.perf_counter() - began
    peak_bytes = memory.peak_bytes()
    send({"event": "stage", "stage": "scoring"})
    validation, _ = trainer.score(prepared.splits.validation)
    test, outcomes = trainer.score(prepared.splits.test)
    artifact.save(injection, directory / "adapter", task=prepared.task.describe())
    write_file(directory / "outcomes.npy", lambda path: _save_array(path, outcomes))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return {
        "validation": validation,
        "test": test,
        "trainable_parameters": injection.trainable_parameters,
        "total_parameters": injection.total_parameters,
        "coverage": injection.coverage,
        "mergeable": injection.mergeable,
        "skipped": injection.skipped,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "adapter_bytes": (directory / "adapter" / adapter_files.TENSORS).stat().st_size,
        "learning_rate": trainer.args.learning_rate,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "options": spec.options,
    }


def _save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array)


class _Reporter(transformers.TrainerCallback):  # type: ignore[misc]
    """Sends each step as a progress event; a parent that is gone ends the trial."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.send({"event": "progress", "step": state.global_step, "steps": state.max_steps})


def summarise(arguments: Mapping[str, Any], send: Send) -> list[dict[str, Any]]:
    """One row per strategy with finished trials, best validation score first."""
    config, results = build(RunConfig, arguments["config"]), arguments["results"]
    task, metric = prepare(config).task, results["metric"]
    rows = []
    for spec in config.strategies:
        trials = [t for t in results["trials"] if t["strategy"] == spec.label and t["status"] == "finished"]
        if not trials:
            continue
        outcomes = [np.load(Path(arguments["directory"]) / t["adapter"] / ".." / "outcomes.npy") for t in trials]
        scores = [t["test"][metric] for t in trials]
        rows.append(
            {
                "strategy": spec.label,
                "seeds": len(trials),
                "score": float(np.mean(scores)),
                "interval": interval(task, outcomes, metric),
                "spread": max(scores) - min(scores),
                "validation_score": float(np.mean([t["validation"][metric] for t in trials])),
                "trainable_parameters": trials[0]["trainable_parameters"],
                "trainable_share": trials[0]["trainable_parameters"] / trials[0]["total_parameters"],
                "mergeable": trials[0]["mergeable"],
                **{
                    name: float(np.median([t[name] for t in trials]))
                    for name in ("seconds", "peak_bytes", "adapter_bytes")
                },
            }
        )
    sign = -1 if results["greater_is_better"] else 1
    return sorted(rows, key=lambda row: (sign * row["validation_score"], row["trainable_parameters"]))


def merge(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Merge one trial's adapter into the base and certify the result on the test split; returns the certificate."""
    config = build(RunConfig, arguments["config"])
    prepared = prepare(config)
    send({"event": "stage", "stage": "merging and verifying"})
    return merge_folder(
        Path(arguments["adapter"]),
        Path(arguments["out"]),
        base=config.model,
        rows=HeldOut(prepared.task, prepared.splits.test),
    )
