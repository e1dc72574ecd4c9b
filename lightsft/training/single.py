"""`lightsft train`: one strategy, one seed, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightsft import adapter_files, artifact, registry
from lightsft.config import SingleConfig
from lightsft.errors import OutputError
from lightsft.files import disk_errors, read_json, write_json
from lightsft.runs import identity_of, require_same_run
from lightsft.tasks.base import Metrics
from lightsft.training.prepared import prepare
from lightsft.training.run import build_trainer, load_backbone
from lightsft.training.trackers import end_trackers


@dataclass(frozen=True)
class Trained:
    """Scores of the best checkpoint."""

    validation: Metrics
    test: Metrics


def train(config: SingleConfig, say: Callable[[str], None] = print) -> Trained:
    """Train, keep the best checkpoint by validation score, save the adapter folder in `config.out`.

    An interrupted run leaves its checkpoints; the same configuration then continues from the last one.
    """
    _require_unfinished(config)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one speaks
        say = _silent
    strategy = registry.strategy(config.strategy.name, **config.strategy.options)
    prepared = prepare(config, examined=True)
    backbone = load_backbone(config, prepared, strategy, config.seed)
    injection = strategy.inject(backbone, seed=config.seed)
    share = injection.trainable_parameters / injection.total_parameters
    say(
        f"{config.strategy.label}: {injection.trainable_parameters:,} of {injection.total_parameters:,} parameters "
        f"trained ({share:.2%}), coverage {injection.coverage:.0%}, computing in {backbone.compute_dtype}"
        + (f", beside weights in {backbone.quantization}" if backbone.quantization else "")
    )
    for line in (*prepared.lines(), *prepared.finding_lines()):
        say(line)
    if injection.skipped:
        say("left out, since a forward pass never calls them: " + ", ".join(injection.skipped))
    for name, rows in prepared.splits.named().items():
        say(f"the first row of {name}:")
        for text, carries_loss in prepared.task.preview(rows[0], backbone.tokenizer):
            say(f"  {'loss   ' if carries_loss else 'no loss'} | {text!r}")
    checkpoints = config.out / "checkpoints"
    trainer = build_trainer(
        config,
        prepared,
        injection,
        learning_rate=config.strategy.learning_rate,
        seed=config.seed,
        directory=checkpoints,
        resumable=True,
        show_progress=True,
    )
    if trainer.frozen_note:
        say(trainer.frozen_note)
    last = _last_checkpoint(checkpoints)
    if last is not None:
        say(f"continuing from {last}")
    if trainer.args.should_save:
        write_json(config.out / "run.json", identity_of(config.model_dump(mode="json")))
    with disk_errors(checkpoints):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    validation, _ = trainer.score(prepared.splits.validation)
    test, _ = trainer.score(prepared.splits.test)
    if trainer.args.should_save:  # of several processes, one does
        artifact.save(injection, config.out, task=prepared.task.describe())
        write_json(config.out / "scores.json", {"validation": validation, "test": test})
        end_trackers(config.track, trainer.args, {"validation": validation, "test": test})
    return Trained(validation, test)


def _silent(text: str) -> None:
    """Instead of print."""


def _last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last."""
    complete = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except OutputError:
        return False
    return True


def _require_unfinished(config: SingleConfig) -> None:
    """Raise OutputError unless `config.out` is free or holds an interrupted run of this configuration."""
    require_same_run(config.out, identity_of(config.model_dump(mode="json")))
    if adapter_files.is_adapter(config.out):
        raise OutputError(
            f"{config.out} holds a finished run of this command",
            expected="a folder that does not exist yet",
            todo="choose another --out to train again",
        )
