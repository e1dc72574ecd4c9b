"""One training run from a configuration: the backbone in the configured precision, the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers

from lightsft.backbone import Backbone
from lightsft.config import TrainConfig
from lightsft.device import choose_device, choose_dtype
from lightsft.dry_run import text_config
from lightsft.errors import ConfigurationError
from lightsft.injection import ActsBetweenSteps, Injection, Strategy
from lightsft.training.prepared import Prepared
from lightsft.training.trainer import Trainer


def load_backbone(config: TrainConfig, prepared: Prepared, strategy: Strategy | None, seed: int) -> Backbone:
    """The backbone in the configured precision; with fp32 weights where the strategy trains them in place."""
    device = choose_device(config.device)
    backbone = Backbone.load(
        config.model,
        task=config.task.name,
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
        train=prepared.training_rows(seed),
        validation=prepared.splits.validation,
        args=args,
        callbacks=extra,
        tokens_per_batch=config.tokens_per_batch,
        packing=config.packing,
    )
