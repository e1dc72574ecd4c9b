"""One training run from a configuration: load, split, inject, train, score."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lightsft.backbone import Backbone
from lightsft.config import TrainConfig
from lightsft.data.reading import Row, read_rows, require_columns
from lightsft.data.splits import Splits, at_most, split_rows
from lightsft.device import choose_device, choose_dtype
from lightsft.dry_run import text_config
from lightsft.errors import ConfigurationError
from lightsft.injection import ActsBetweenSteps, Injection, Strategy
from lightsft.tasks import Task, task
from lightsft.training.optimizers import require_usable
from lightsft.training.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """A task and its rows, checked."""

    task: Task
    splits: Splits
    metric: str  # the score that picks checkpoints and winners


def prepare(config: TrainConfig) -> Prepared:
    """Check the settings, then read the data. Nothing heavy: every error about either comes from here."""
    _require_known("scheduler", config.scheduler, SchedulerType)
    _require_known("optimizer", config.optimizer, OptimizerNames)
    require_usable(config.optimizer, config.optimizer_options, choose_device(config.device))
    return read(config)


def read(config: TrainConfig) -> Prepared:
    """Read and check the data, find the labels, split."""
    rows = read_rows(config.data, encoding=config.encoding)
    chosen = _task(config, rows)
    chosen.check(rows, config.data)
    splits = _splits(config, rows, chosen)
    return Prepared(chosen, splits, _metric(config, chosen))


def _require_known(name: str, value: str, choices: Iterable[Any]) -> None:
    known = [str(choice.value) for choice in choices]
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise ConfigurationError(
            f"no {name} named {value!r}",
            expected=f"one of {', '.join(known)}",
            todo=f"did you mean {near[0]!r}?" if near else "",
        )


def _metric(config: TrainConfig, chosen: Task) -> str:
    metric = config.metric or chosen.metric
    if metric not in chosen.metric_names:
        raise ConfigurationError(
            f"{chosen.name} has no metric {metric!r}", expected=f"one of {', '.join(chosen.metric_names)}"
        )
    return metric


def _task(config: TrainConfig, rows: list[Row]) -> Task:
    options: dict[str, Any] = {} if config.max_length is None else {"max_length": config.max_length}
    if config.task == "classification":
        from lightsft.tasks.classification import labels_of

        columns = [config.text, config.text_pair, config.label]
        require_columns(rows, [column for column in columns if column is not None], config.data)
        labels = config.labels or labels_of(rows, config.label, config.data)
        options |= {
            "labels": labels,
            "text": config.text,
            "label": config.label,
            "text_pair": config.text_pair,
        }
    elif config.chat_template is not None:
        options["chat_template"] = _template(Path(config.chat_template))
    return task(config.task, **options)


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read the chat template {path}: {error}",
            expected="a file with a Jinja template in UTF-8",
            todo="check the path",
        ) from error


def _splits(config: TrainConfig, rows: list[Row], chosen: Task) -> Splits:
    """Files of their own for validation and test are taken as they are; what is not given is split off by hash."""
    given = {"validation": config.validation_data, "test": config.test_data}
    own = {name: read_rows(source, encoding=config.encoding) for name, source in given.items() if source}
    for name, part in own.items():
        chosen.check(part, str(given[name]))
    shares = {
        "validation": 0.0 if "validation" in own else config.validation_share,
        "test": 0.0 if "test" in own else config.test_share,
    }
    parts = {"train": rows} if len(own) == 2 else split_rows(rows, chosen.key, **shares).named()
    parts |= own
    limits = {
        "train": config.max_train_examples,
        "validation": config.max_validation_examples,
        "test": config.max_test_examples,
    }
    return Splits(**{name: at_most(part, limits[name], chosen.key) for name, part in parts.items()})


def load_backbone(config: TrainConfig, prepared: Prepared, strategy: Strategy | None, seed: int) -> Backbone:
    """The backbone in the configured precision; with fp32 weights where the strategy trains them in place."""
    device = choose_device(config.device)
    backbone = Backbone.load(
        config.model,
        task=config.task,
        labels=getattr(prepared.task, "labels", None),
        dtype=choose_dtype(config.dtype, device),
        weight_dtype=torch.float32 if getattr(strategy, "trains_weights", False) and not config.quantization else None,
        quantization=config.quantization,
        double_quantization=config.double_quantization,
        device=str(device),
        seed=seed,
    )
    _require_positions(config, prepared, backbone, taken=getattr(strategy, "positions_taken", 0))
    return backbone


def _require_positions(config: TrainConfig, prepared: Prepared, backbone: Backbone, taken: int) -> None:
    """Raise ConfigurationError if texts may be longer than the model reads beside what the strategy puts in front."""
    model, tokenizer = backbone.model, backbone.tokenizer
    positions = getattr(text_config(model), "max_position_embeddings", None) or 0
    limit = min(max(0, positions - taken) if positions > 0 else math.inf, tokenizer.model_max_length)
    wanted = config.max_length or min(getattr(prepared.task, "max_length", 0), tokenizer.model_max_length)
    if limit == 0:
        raise ConfigurationError(
            f"{taken} virtual tokens, but {type(model).__name__} from {config.model} reads {positions} tokens in all",
            expected=f"fewer than {positions} of them",
            todo="set num_virtual_tokens to less",
        )
    if wanted > limit:
        beside = f" beside {taken} virtual tokens" if taken else ""
        raise ConfigurationError(
            f"inputs of up to {wanted} tokens, but {type(model).__name__} from {config.model} reads {limit}{beside}",
            expected=f"a max_length of at most {limit}",
            todo=f"--max-length {limit}: longer texts are cut",
        )


def build_trainer(
    config: TrainConfig,
    prepared: Prepared,
    injection: Injection,
    *,
    learning_rate: float | None,
    seed: int,
    directory: Path,
    resumable: bool,
    callbacks: list[Any] | None = None,
    show_progress: bool = False,
) -> Trainer:
    """The trainer for one run; checkpoints of every epoch go to `directory`, the best one is kept at the end."""
    args = transformers.TrainingArguments(
        str(directory),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.evaluation_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=learning_rate or config.learning_rate or getattr(injection.strategy, "learning_rate", 5e-5),
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_gradient_norm,
        optim=config.optimizer,
        optim_args=config.optimizer_options,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        save_only_model=not resumable,
        load_best_model_at_end=True,
        metric_for_best_model=prepared.metric,
        greater_is_better=prepared.task.greater_is_better(prepared.metric),
        logging_steps=10,
        seed=seed,
        data_seed=seed,
        use_cpu=injection.model.device.type == "cpu",
        dataloader_pin_memory=injection.model.device.type == "cuda",
        disable_tqdm=not show_progress,
        report_to="none",
    )
    if config.gradient_checkpointing:
        injection.model.gradient_checkpointing_enable()
    extra = list(callbacks or [])
    if isinstance(injection.strategy, ActsBetweenSteps):
        extra += injection.strategy.callbacks(injection)
    if config.early_stopping is not None:
        extra.append(transformers.EarlyStoppingCallback(config.early_stopping))
    return Trainer(
        injection,
        prepared.task,
        train=prepared.splits.train,
        validation=prepared.splits.validation,
        args=args,
        callbacks=extra,
    )
