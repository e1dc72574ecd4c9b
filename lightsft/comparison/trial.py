"""One training of a comparison: a trial that is scored on test rows, or a search's, which never sees them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lightsft import adapter_files, artifact, registry
from lightsft.comparison import search, shared
from lightsft.comparison.measures.calibration import calibration
from lightsft.comparison.measures.deployment import deployment
from lightsft.comparison.measures.energy import energy
from lightsft.comparison.measures.forgetting import forgetting
from lightsft.comparison.measures.groups import by_group
from lightsft.comparison.measures.robustness import robustness
from lightsft.comparison.memory import PeakMemory
from lightsft.config import RunConfig, StrategySpec, build
from lightsft.device import choose_device
from lightsft.files import disk_errors, write_array
from lightsft.injection import Injection
from lightsft.training.prepared import Prepared
from lightsft.training.run import build_trainer
from lightsft.training.trackers import end_trackers
from lightsft.training.trainer import Trainer

Send = Callable[[dict[str, Any]], None]
FORGETTING_BATCH = 4  # windows of neutral text per step


@dataclass(frozen=True)
class SetUp:
    """A strategy on its backbone, ready to be trained."""

    config: RunConfig
    prepared: Prepared
    injection: Injection
    trainer: Trainer
    memory: PeakMemory
    options: dict[str, Any]  # of the strategy, those that a search chose among them


def set_up(arguments: Mapping[str, Any], callbacks: list[Any]) -> SetUp:
    """What `arguments` describe: config, spec, seed, directory; parameters of a search; shots, examples per class."""
    config = build(RunConfig, arguments["config"])
    if arguments.get("shots"):
        config = config.model_copy(update={"shots": arguments["shots"]})
    spec, seed = StrategySpec(**arguments["spec"]), int(arguments["seed"])
    directory = Path(arguments["directory"])
    parameters = dict(arguments.get("parameters") or {})
    rate = parameters.pop("learning_rate", spec.learning_rate)
    options = {**spec.options, **parameters}
    prepared = replace(shared.prepared_for(config), shots=config.shots)
    memory = PeakMemory(choose_device(config.device))
    strategy = registry.strategy(spec.name, **options)
    backbone, held = shared.backbone_for(config, prepared, strategy, seed)
    memory.count(held)
    injection = strategy.inject(backbone, seed=seed)
    trainer = build_trainer(
        config,
        prepared,
        injection,
        learning_rate=rate,
        seed=seed,
        directory=directory / "checkpoints",
        resumable=False,
        callbacks=callbacks,
        encoded=shared.encoded_for(config, backbone.tokenizer),
        name=directory.name,
        group=config.out.name,
    )
    if trainer.frozen_note:
        print(trainer.frozen_note)
    return SetUp(config, prepared, injection, trainer, memory, options)


def tried(arguments: Mapping[str, Any], send: Send) -> None:
    """Place a strategy on the backbone, which raises what keeps it from running there. arguments: config, spec."""
    config, spec = build(RunConfig, arguments["config"]), StrategySpec(**arguments["spec"])
    strategy = registry.strategy(spec.name, **spec.options)
    backbone, _ = shared.backbone_for(config, shared.prepared_for(config), strategy, seed=0)
    strategy.inject(backbone, seed=0)


def trial(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Train one strategy with one seed, score it, save it; everything it leaves is in its own folder."""
    directory = Path(arguments["directory"])
    run = set_up(arguments, [_Reporter(send)])
    with energy(run.injection.model.device) as taken:
        seconds = _trained(run, directory)
    alone = run.config.jobs == 1  # the counters are the machine's: they know no trial from another
    found = {**_costs(run, seconds), "joules": taken.joules if alone else None, "peak_bytes": _peak_bytes(run)}
    send({"event": "stage", "stage": "scoring"})
    found |= _scored(run, directory)
    if run.trainer.args.should_save:  # of several processes, one does
        artifact.save(run.injection, directory / "adapter", task=run.prepared.task.describe())
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        found["adapter_bytes"] = (directory / "adapter" / adapter_files.TENSORS).stat().st_size
    if arguments.get("examined"):
        send({"event": "stage", "stage": "examining"})
        found |= _examined(run)
    _end_trackers(run, found)
    return found


def searched(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """The next trial of a strategy's search: what it tried, and how it did on validation rows.

    arguments, besides those of `set_up`: space, default, records of the search so far.
    """
    directory, began = Path(arguments["directory"]), time.perf_counter()
    greater = arguments["greater_is_better"]
    attempt = search.Trial(
        arguments["spec"]["label"], arguments["space"], arguments["default"], arguments["records"], greater
    )
    send({"event": "proposed", "parameters": attempt.parameters})
    pruning = _Pruning(attempt)
    try:
        run = set_up({**arguments, "parameters": attempt.parameters}, [_Reporter(send), pruning])
        pruning.metric = run.prepared.metric
        _trained(run, directory)
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    scores = [score for _, score in attempt.curve]
    best = (max(scores) if greater else min(scores)) if scores else None
    _end_trackers(run, {"validation": {run.prepared.metric: best}, **attempt.parameters})
    return {
        "status": "pruned" if pruning.pruned else "finished",
        "parameters": attempt.parameters,
        "validation": best,
        "curve": attempt.curve,
        "steps": run.trainer.state.global_step,
        "seconds": time.perf_counter() - began,
    }


def _trained(run: SetUp, directory: Path) -> float:
    """Wall seconds of the training, its validations included."""
    began = time.perf_counter()
    with disk_errors(directory):
        run.trainer.train()
    return time.perf_counter() - began


def _scored(run: SetUp, directory: Path) -> dict[str, Any]:
    """Scores of the best weights; the outcomes per example go to the trial's folder."""
    task, splits = run.prepared.task, run.prepared.splits
    encoded = shared.encoded_for(run.config, run.injection.backbone.tokenizer)
    validation, chosen_on = run.trainer.score(encoded.get("validation") or splits.validation)
    test, outcomes = run.trainer.score(encoded.get("test") or splits.test)
    if run.trainer.args.should_save:
        write_array(directory / "outcomes.npy", outcomes)
    found = {"validation": validation, "test": test, "calibration": calibration(task, chosen_on, outcomes)}
    if run.config.score_by is not None:
        groups = [row.get(run.config.score_by) for row in splits.test]
        found["groups"] = by_group(task, outcomes, groups, run.prepared.metric)
    return found


def _examined(run: SetUp) -> dict[str, Any]:
    """What takes further passes, and is done for one seed of each strategy. The injection is merged in the end."""
    config, prepared, task = run.config, run.prepared, run.prepared.task
    found: dict[str, Any] = {}
    if config.robustness:
        found["robustness"] = robustness(task, prepared.splits.test, lambda rows: _numbers(run.trainer.score(rows)[0]))
    if not run.trainer.args.should_save:  # another process does what is done alone
        return found
    if config.forgetting:
        texts = None if config.neutral_text is None else [Path(config.neutral_text).read_text(config.encoding)]
        found["forgetting"] = forgetting(run.injection, texts, batch_size=FORGETTING_BATCH)
    rows = prepared.splits.validation
    return found | deployment(run.injection, task, rows, prepared.metric, config.evaluation_batch_size)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _end_trackers(run: SetUp, found: Mapping[str, Any]) -> None:
    if run.trainer.args.should_save:
        end_trackers(run.config.track, run.trainer.args, {**found, "curve": None})


def _costs(run: SetUp, seconds: float) -> dict[str, Any]:
    """What training took."""
    injection, trainer, record = run.injection, run.trainer, run.trainer.record
    target = run.config.score_target
    tokens = record.tokens_after(trainer.state.global_step)
    return {
        "trainable_parameters": injection.trainable_parameters,
        "total_parameters": injection.total_parameters,
        "coverage": injection.coverage,
        "mergeable": injection.mergeable,
        "skipped": injection.skipped,
        "seconds": seconds,
        "training_seconds": record.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / record.seconds if record.seconds else None,
        "seconds_to_target": None
        if target is None
        else record.seconds_to(target, run.prepared.task.greater_is_better(run.prepared.metric)),
        "curve": record.curve,
        "learning_rate": trainer.args.learning_rate,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "options": run.options,
        "frozen_cache": trainer.frozen_cache,
    }


def _peak_bytes(run: SetUp) -> int:
    """Of all processes together."""
    peak = run.memory.peak_bytes()
    if run.trainer.args.world_size == 1:
        return peak
    peaks = run.trainer.accelerator.gather(torch.tensor([peak], device=run.trainer.args.device))
    return int(peaks.sum())


class _Reporter(transformers.TrainerCallback):  # type: ignore[misc]
    """Sends each step as a progress event; a parent that is gone ends the trial."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.send({"event": "progress", "step": state.global_step, "steps": state.max_steps})


class _Pruning(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports each validation to the search, and ends the trial where that says so."""

    def __init__(self, attempt: search.Trial) -> None:
        self.attempt, self.metric, self.pruned = attempt, "", False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
        if (
            self.attempt.report(state.global_step, metrics[f"eval_{self.metric}"])
            and state.global_step < state.max_steps
        ):
            self.pruned = control.should_training_stop = True
