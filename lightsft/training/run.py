"""One training run from a configuration: the backbone in the configured precision, the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lightsft.backbone import Backbone
from lightsft.config import TrainConfig
from lightsft.data.batching import MULTIPLE
from lightsft.device import choose_device, choose_dtype
from lightsft.dry_run import text_config
from lightsft.errors import ConfigurationError
from lightsft.injection import ActsBetweenSteps, Injection, Strategy
from lightsft.training.budget import NEVER, budgeted, set_budget
from lightsft.training.frozen_part import keep_frozen
from lightsft.training.prepared import Prepared
from lightsft.training.progress import Finite
from lightsft.training.trackers import reported_to, use_trackers
from lightsft.training.trainer import Encoded, Trainer


def load_backbone(config: TrainConfig, prepared: Prepared, strategy: Strategy | None, seed: int) -> Backbone:
    """The backbone in the configured precision; with fp32 weights where the strategy trains them in place."""
    device = choose_device(config.device)
    backbone = Backbone.load(
        config.model,
        task=config.task.name,
        labels=getattr(prepared.task, "labels", None),
        dtype=choose_dtype(config.dtype, device),
        weight_dtype=weight_dtype(config, strategy),
        quantization=config.quantization,
        double_quantization=config.double_quantization,
        device=str(device),
        seed=seed,
    )
    require_positions(config, prepared, backbone, strategy)
    return backbone


def weight_dtype(config: TrainConfig, strategy: Strategy | None) -> torch.dtype | None:
    """The type of the weights where it is not the one that is computed in: fp32 for weights that are trained."""
    return torch.float32 if getattr(strategy, "trains_weights", False) and not config.quantization else None


def require_positions(config: TrainConfig, prepared: Prepared, backbone: Backbone, strategy: Strategy | None) -> None:
    """Raise ConfigurationError if texts may be longer than the model reads beside what the strategy puts in front."""
    taken = getattr(strategy, "positions_taken", 0)
    model, tokenizer = backbone.model, backbone.tokenizer
    if not hasattr(prepared.task, "max_length"):
        return
    positions = getattr(text_config(model), "max_position_embeddings", None) or 0
    limit = min(max(0, positions - taken) if positions > 0 else math.inf, tokenizer.model_max_length)
    wanted = config.max_length or min(prepared.task.max_length, tokenizer.model_max_length)
    if limit == 0:
        raise ConfigurationError(
            f"{taken} virtual tokens, but {type(model).__name__} from {config.model} reads {positions} tokens in all",
            expected=f"fewer than {positions} of them",
            todo="set num_virtual_tokens to less",
        )
    if -(-wanted // MULTIPLE) * MULTIPLE > limit:  # as batches are padded
        beside = f" beside {taken} virtual tokens" if taken else ""
        fitting = int(limit) // MULTIPLE * MULTIPLE
        raise ConfigurationError(
            f"inputs of up to {wanted} tokens, but {type(model).__name__} from {config.model} reads {limit}{beside}",
            expected=f"a max_length of at most {fitting}, a multiple of {MULTIPLE} to which batches are padded",
            todo=f"--max-length {fitting}: longer texts are cut",
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
    encoded: Mapping[str, Encoded] | None = None,
    name: str | None = None,
    group: str = "lightsft",
) -> Trainer:
    """The trainer for one run; a checkpoint of every validation goes to `directory`, the best one is kept at the end.

    encoded: the splits as features, where they are at hand. name, group: of the run, for trackers.
    """
    name = name or config.out.name
    by_epoch = config.evaluations is None and not budgeted(config)
    args = transformers.TrainingArguments(
        str(directory),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
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
        eval_strategy="epoch" if by_epoch else "steps",
        save_strategy="epoch" if by_epoch else "steps",
        eval_steps=None if by_epoch else NEVER,
        save_steps=NEVER,
        save_total_limit=2,
        save_only_model=not resumable,
        load_best_model_at_end=True,
        metric_for_best_model=prepared.metric,
        greater_is_better=prepared.task.greater_is_better(prepared.metric),
        logging_steps=10,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        use_cpu=injection.model.device.type == "cpu",
        dataloader_pin_memory=injection.model.device.type == "cuda",
        disable_tqdm=not show_progress,
        report_to=reported_to(config.track),
        run_name=name,
        project=group,
    )
    args.trackio_static_space_id = False  # it would publish a page on the hub
    use_trackers(config.track, config.out, group, name)
    if config.gradient_checkpointing:
        injection.model.gradient_checkpointing_enable()
    extra = [Finite(), *(callbacks or [])]
    if isinstance(injection.strategy, ActsBetweenSteps):
        extra += injection.strategy.callbacks(injection)
    if config.early_stopping is not None:
        extra.append(transformers.EarlyStoppingCallback(config.early_stopping))
    encoded = encoded or {}
    trainer = Trainer(
        injection,
        prepared.task,
        train=encoded.get("train") or prepared.training_rows(seed),
        validation=encoded.get("validation") or prepared.splits.validation,
        args=args,
        callbacks=extra,
        tokens_per_batch=config.tokens_per_batch,
        packing=config.packing,
    )
    set_budget(trainer, config)
    trainer.frozen_note = keep_frozen(trainer, config.cache_frozen, directory)
    return trainer
