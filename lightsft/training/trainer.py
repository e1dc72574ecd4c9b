"""Trainer: transformers.Trainer for an injection and a task, the same for every strategy.

What it changes: only the injection is optimized, saved and loaded; the task gives the loss and the metrics; batches
come in an order that no strategy influences; half precision is plain autocast around each step. Callbacks, loggers,
schedulers, accelerate and resuming work as in transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightsft import adapter_files, artifact
from lightsft.data.batching import SimilarLengths, TokenBudget
from lightsft.data.budget import tokens_of_updates
from lightsft.data.packing import pack
from lightsft.data.reading import Row
from lightsft.data.shares import ABSENT, Shares, StandIns
from lightsft.errors import ConfigurationError, DataError
from lightsft.injection import Injection
from lightsft.tasks.base import Metrics, Task
from lightsft.training.clock import PARTS, follow_clock
from lightsft.training.evaluate import announce, observed
from lightsft.training.frozen_cache import ROWS, FrozenCache
from lightsft.training.optimizers import classes_in_state, forget_overrides, recipe
from lightsft.training.packable import find_layout
from lightsft.training.progress import Record


class Encoded(Dataset[dict[str, Any]]):
    """Token features as a data set."""

    def __init__(self, features: Sequence[dict[str, Any]]) -> None:
        self.features = list(features)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.features[index]

    def lengths(self, task: Task) -> list[int]:
        """What each costs, in tokens."""
        return [task.length(feature) for feature in self.features]

    def reordered(self, order: Iterable[int]) -> Encoded:
        """The same examples in another order."""
        return Encoded([self.features[index] for index in order])


class Trainer(transformers.Trainer):
    """Trains `injection` on rows of `task`.

        trainer = Trainer(injection, task, train=rows, validation=rows, args=TrainingArguments("out"))
        trainer.train()

    `train` and `validation` are rows as `lightsft.data.reading.read_rows` gives them, a `datasets.Dataset`, or what
    `encoded` made of either.
    tokens_per_batch: padded tokens of a batch, instead of the batch size of `args`. packing: lay the sequences of a
    batch side by side (`lightsft.data.packing`); refused where that is not exact. The learning rate of `args` holds
    unless `args` is None: then the strategy's own default does. Further keyword arguments go to transformers.Trainer.
    """

    record: Record  # of a run that a configuration describes
    clock: Callable[[], float] | None = None  # the share of the time that is spent, under a budget in time
    frozen: FrozenCache | None = None  # of what nothing trainable lies below
    frozen_cache: str | None = None  # the same in words
    frozen_note: str | None = None  # that, or why there is none although the first blocks are frozen

    def __init__(
        self,
        injection: Injection,
        task: Task,
        *,
        train: Sequence[Row] | Encoded | None = None,
        validation: Sequence[Row] | Encoded | None = None,
        args: transformers.TrainingArguments | None = None,
        tokens_per_batch: int | None = None,
        packing: bool = False,
        **options: Any,
    ) -> None:
        task = task.for_model(bool(injection.model.config.is_encoder_decoder))
        self.injection, self.task = injection, task
        self.tokenizer = injection.backbone.tokenizer
        if self.tokenizer is None:
            raise ConfigurationError(
                "the backbone has no tokenizer",
                expected="Backbone.load(...), or Backbone(model, tokenizer=tokenizer)",
            )
        self.half_precision = _autocast_dtype(injection)
        self.tokens_per_batch = tokens_per_batch
        self.layout = find_layout(injection, task) if packing else None
        args = args or transformers.TrainingArguments(
            "lightsft-output",
            learning_rate=getattr(injection.strategy, "learning_rate", 5e-5),
            use_cpu=injection.model.device.type == "cpu",
            report_to="none",
        )
        args.remove_unused_columns = False
        with _passing_for_trainable(injection.model):
            super().__init__(
                model=injection.model,
                args=args,
                train_dataset=self._encoded(train),
                eval_dataset=_by_length(self._encoded(validation), task),
                data_collator=self._collate,
                compute_loss_func=task.loss,
                compute_metrics=self._metrics,
                **options,
            )

    def _encoded(self, rows: Sequence[Row] | Encoded | None) -> Encoded | None:
        if rows is None or isinstance(rows, Encoded):
            return rows
        rows = list(rows)
        if not rows:
            raise DataError("there are no rows to train or validate on", expected="at least one row")
        self.task.check(rows, "the given data")
        return Encoded(self.task.encode(rows, self.tokenizer))

    def _metrics(self, prediction: Any) -> Metrics:
        """Of the examples that were evaluated last."""
        return self.task.metrics(self.task.by_row(prediction.predictions, self.evaluated.features, self.tokenizer))

    # ---- batches and precision

    def _get_dataloader(
        self, dataset: Encoded, description: str, batch_size: int, *arguments: Any, is_training: bool = False, **o: Any
    ) -> DataLoader[Any]:
        """As transformers'; to train, with batches by tokens and the training collator."""
        if not is_training:
            plain: DataLoader[Any] = super()._get_dataloader(dataset, description, batch_size, *arguments, **o)
            return plain
        if self.args.world_size > 1:
            return self._shared_out(dataset)
        if self.tokens_per_batch is not None:
            return self._by_tokens(dataset, self.tokens_per_batch)
        before: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = self._collate_training
        try:
            made: DataLoader[Any] = super()._get_dataloader(
                dataset, description, batch_size, *arguments, is_training=True, **o
            )
        finally:
            self.data_collator = before
        return made

    def _by_tokens(self, dataset: Encoded, budget: int) -> DataLoader[Any]:
        loader = DataLoader(
            dataset,
            batch_sampler=TokenBudget(dataset.lengths(self.task), budget, self._data_seed),
            collate_fn=self._collate_training,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _shared_out(self, dataset: Encoded) -> DataLoader[Any]:
        """The part of this process of batches that all of them train on together."""
        loader = DataLoader(
            StandIns(dataset),
            batch_sampler=Shares(self._sampler(dataset), self.args.process_index, self.args.world_size),
            collate_fn=self._collate_training,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        shard: DataLoader[Any] = prepare_data_loader(loader, self.args.device, num_processes=1, put_on_device=True)
        return shard

    def _sampler(self, dataset: Encoded) -> SimilarLengths | TokenBudget:
        """Rows, or batches of rows by tokens, for all processes together."""
        lengths = dataset.lengths(self.task)
        if self.tokens_per_batch is not None:
            return TokenBudget(lengths, self.tokens_per_batch, self._data_seed)
        return SimilarLengths(lengths, self.args.train_batch_size * self.args.world_size, self._data_seed)

    def _collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The task's batch, with the numbers of examples whose frozen states are kept."""
        batch = self.task.collate(features, self.tokenizer)
        rows = None if self.frozen is None else self.frozen.rows_of(features)
        return batch if rows is None else {**batch, ROWS: rows}

    def _behind_frozen(self, rows: Tensor | None, batch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Within it a forward pass on a batch with `rows` begins where something is trained."""
        if self.frozen is None or rows is None:
            return contextlib.nullcontext()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.frozen.passing(rows, inputs, batch["labels"])

    def _collate_training(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch for this epoch, packed if that was asked for."""
        draw = self._data_seed * 1_000_003 + int(self.state.epoch or 0)
        drawn = [self.task.drawn(feature, self.tokenizer, draw) for feature in features]
        batch: dict[str, Tensor]
        if self.layout is None:
            batch = self.data_collator(drawn)
        else:
            batch = pack(drawn, self.layout, self.tokenizer.pad_token_id or 0, shifts=self.task.shifts)
        return {**batch, ABSENT: torch.tensor(True)} if f"_{ABSENT}" in features[0] else batch

    @property
    def _data_seed(self) -> int:
        return int(self.args.data_seed if self.args.data_seed is not None else self.args.seed)

    def tokens_of_updates(self) -> Iterator[int]:
        """Real tokens that update 1, 2, ... of a training reads."""
        sampler, steps = self._sampler(self.train_dataset), self.args.gradient_accumulation_steps
        if isinstance(sampler, TokenBudget):
            steps *= self.args.world_size
        return tokens_of_updates(sampler, self.train_dataset.lengths(self.task), steps)

    def _get_train_sampler(self, train_dataset: Encoded | None = None) -> SimilarLengths | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, Encoded):
            return None
        return SimilarLengths(dataset.lengths(self.task), self.args.train_batch_size, self._data_seed)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast to the backbone's compute type where fp32 masters are trained, in training and evaluation."""
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        if self.half_precision is not None:
            stack.enter_context(torch.autocast(self.args.device.type, self.half_precision))
        return stack

    # ---- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with the strategy's learning-rate ratios as groups of their own (LoRA+)."""
        optimizer: torch.optim.Optimizer
        if self.optimizer is not None:
            optimizer = super().create_optimizer(model)
            return optimizer
        given: Any = self.optimizer_cls_and_kwargs  # type: ignore[has-type]
        projection: dict[str, Any] = {}
        if given is None:
            made = recipe(self.args)
            self.optimizer_cls_and_kwargs, projection = (made.kind, made.options), made.projection
        forget_overrides()
        optimizer = super().create_optimizer(model)
        self.optimizer_cls_and_kwargs = given
        if projection:
            self._project(optimizer, projection)
        self._split_by_ratio(optimizer)
        return optimizer

    def _project(self, optimizer: torch.optim.Optimizer, projection: dict[str, Any]) -> None:
        """Give the matrices that are larger than the rank their own groups: GaLore and APOLLO project these alone."""
        rank = int(projection["rank"])
        tables = {id(module.weight) for module in self.injection.model.modules() if isinstance(module, nn.Embedding)}
        trained = [p for p in self.injection.parameters() if p.ndim == 2 and id(p) not in tables]
        matrices = {id(p) for p in trained if min(p.shape) > rank}
        if not matrices:
            widest = max((min(p.shape) for p in trained), default=0)
            raise ConfigurationError(
                f"{self.args.optim.value} projects gradients to rank {rank}, and no matrix that "
                f"{type(self.injection.strategy).__name__} trains is larger (the widest has {widest})",
                expected="a strategy that trains weights of the backbone (full), or a smaller rank",
                todo="take adamw_torch or adamw_8bit with this strategy"
                + (f", or optimizer_options: rank={widest // 2}" if widest > 1 else ""),
            )
        for group in list(optimizer.param_groups):
            chosen = [p for p in group["params"] if id(p) in matrices]
            if chosen:
                _move(optimizer, group, chosen, **projection)

    def _split_by_ratio(self, optimizer: torch.optim.Optimizer) -> None:
        named = self.injection.named_parameters()
        ratios = {id(p): self.injection.learning_rate_ratio(name) for name, p in named.items()}
        for group in list(optimizer.param_groups):
            for ratio in sorted({ratios.get(id(p), 1.0) for p in group["params"]} - {1.0}):
                faster = [p for p in group["params"] if ratios.get(id(p)) == ratio]
                _move(optimizer, group, faster, lr=group["lr"] * ratio)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As transformers'; under a budget in time, one that follows the clock."""
        if self.clock is None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = super().create_scheduler(PARTS, optimizer)
        follow_clock(schedule, self.clock)
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with torch.serialization.safe_globals(classes_in_state(self.optimizer)):
            super()._load_optimizer_and_scheduler(checkpoint)

    # ---- evaluation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss of what it has the model say."""
        absent = inputs.pop(ABSENT, None) is not None
        rows = inputs.pop(ROWS, None)
        announce(self.injection.model, inputs)
        with self._behind_frozen(rows, inputs):
            labels = inputs.pop("labels")
            outputs = self.task.forward(model, inputs, labels)
        loss = self.task.loss(outputs, labels, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over them
        if absent:
            loss = loss * 0
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """What the summed losses of one update are divided by, over all processes."""
        if not batch_samples:
            return None
        counted = [self.task.items(batch["labels"]) * (ABSENT not in batch) for batch in batch_samples]
        items = torch.stack(counted).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items[None]).sum()
        return items

    def evaluation_loop(self, dataloader: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers', remembering which examples are evaluated."""
        self.evaluated = dataloader.dataset
        return super().evaluation_loop(dataloader, *arguments, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, and the task's outcomes in place of logits: a few numbers per example."""
        inputs = self._prepare_inputs(inputs)
        rows = inputs.pop(ROWS, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            behind = self._behind_frozen(rows, inputs)
            loss, outcomes = observed(self.task, model, inputs, self.injection.model, behind)
        if prediction_loss_only:
            return loss, None, None
        return loss, outcomes, torch.zeros(outcomes.shape[0], 1, device=outcomes.device)

    def score(self, rows: Sequence[Row] | Encoded) -> tuple[Metrics, np.ndarray[Any, Any]]:
        """(metrics, outcomes) of the present weights on `rows`; outcomes are in the order of the rows."""
        encoded = rows if isinstance(rows, Encoded) else Encoded(self.task.encode(rows, self.tokenizer))
        order = np.argsort(encoded.lengths(self.task), kind="stable")
        found = super().predict(encoded.reordered(order), metric_key_prefix="test").predictions
        outcomes = np.empty_like(found)
        outcomes[order] = found
        by_row = self.task.by_row(outcomes, encoded.features, self.tokenizer)
        return self.task.metrics(by_row), by_row

    # ---- saving and loading: the injection, not the model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # another process does
            return
        directory = Path(output_dir or self.args.output_dir)
        artifact.save(self.injection, directory, task=self.task.describe())
        torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.injection.load_tensors(adapter_files.read_tensors(Path(resume_from_checkpoint)), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


@contextlib.contextmanager
def _passing_for_trainable(model: Any) -> Iterator[None]:
    """transformers refuses to train a quantized model unless PEFT's adapters are on it; ours are."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def _move(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[nn.Parameter], **own: Any) -> None:
    """Take parameters out of a group, into one that differs from it in `own`."""
    moved = {id(p) for p in parameters}
    group["params"] = [p for p in group["params"] if id(p) not in moved]
    optimizer.add_param_group({**group, "params": parameters, **own})


def _by_length(dataset: Encoded | None, task: Task) -> Encoded | None:
    """Similar lengths side by side waste little padding; in evaluation the order does not matter."""
    return None if dataset is None else dataset.reordered(np.argsort(dataset.lengths(task), kind="stable"))


def _autocast_dtype(injection: Injection) -> torch.dtype | None:
    """The compute type, where weights are wider than it; None where the model computes in its weights' type."""
    compute = injection.backbone.compute_dtype
    wider = injection.trains_backbone_weights or injection.backbone.stored_dtype != compute
    return compute if wider and compute != torch.float32 else None
