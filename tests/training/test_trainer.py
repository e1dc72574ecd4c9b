"""One trainer for every strategy: a transformers.Trainer that trains, saves and resumes the injection alone."""

from pathlib import Path

import datasets
import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import lightsft
from lightsft import Backbone, Trainer, adapter_files, artifact
from lightsft.errors import ConfigurationError, DataError
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from tests.checkpoints import LABELS, chat_rows, labelled_rows

STRATEGIES = [Full(), Full(targets="head"), LoRA(rank=4), Adapter(reduction_factor=4), Prefix(num_virtual_tokens=4)]
FROZEN = [strategy for strategy in STRATEGIES if strategy != Full()]
ROWS = labelled_rows(96)
TASK = lightsft.task("classification", labels=LABELS)


def short(strategy):
    """A name for a test's id."""
    return "probe" if strategy == Full(targets="head") else type(strategy).__name__.lower()


@pytest.fixture
def make(bert, tmp_path):
    """A trainer for a strategy on the tiny BERT; further arguments go to TrainingArguments."""

    def trainer(strategy, *, rows=ROWS, task=TASK, model=None, callbacks=(), loading=None, seed=0, **changes):
        options = {"task": task.name, "dtype": "float32", "device": "cpu", "seed": seed, **(loading or {})}
        backbone = Backbone.load(model or bert, labels=getattr(task, "labels", None), **options)
        values = {"num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "seed": seed}
        values |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "eval_strategy": "epoch"}
        values |= {"save_strategy": "no", "logging_strategy": "epoch", **changes}
        return Trainer(
            strategy.inject(backbone, seed=seed),
            task,
            train=rows,
            validation=list(rows)[:32],
            args=TrainingArguments(str(tmp_path / "checkpoints"), **values),
            callbacks=list(callbacks),
        )

    return trainer


def trained(trainer):
    """The tensors after training."""
    trainer.train()
    return {name: tensor.clone() for name, tensor in trainer.injection.tensors().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


class Batches(TrainerCallback):
    """Keeps the ids of every training batch."""

    def __init__(self):
        self.seen = []

    def watch(self, trainer):
        collate = trainer.data_collator
        trainer.data_collator = lambda features: self._keep(collate(features))
        return trainer

    def _keep(self, batch):
        if torch.is_grad_enabled() and "labels" in batch:
            self.seen.append(batch["input_ids"].tolist())
        return batch


# ---- training


@pytest.mark.parametrize("strategy", STRATEGIES, ids=short)
def test_every_strategy_learns(make, strategy):
    trainer = make(strategy)
    assert isinstance(trainer, transformers.Trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer)[-1] < before - 0.05
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]


@pytest.mark.parametrize("strategy", FROZEN, ids=short)
def test_only_what_was_injected_changes(make, strategy):
    trainer = make(strategy)
    model, injection = trainer.injection.model, trainer.injection
    mine = {id(parameter) for parameter in injection.parameters()}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in mine}
    start = {name: tensor.detach().clone() for name, tensor in injection.named_parameters().items()}
    trainer.train()
    parameters = dict(model.named_parameters())
    assert len(frozen) > 20
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())
    assert not [name for name, p in injection.named_parameters().items() if torch.equal(p, start[name])]


def test_the_chat_task_learns(make, llama):
    trainer = make(LoRA(rank=4), rows=chat_rows(48), task=lightsft.task("chat"), model=llama)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer)[-1] < before - 0.5


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(make, tmp_path):
    folders = []
    for number, seed in enumerate((0, 0, 1)):
        trainer = make(LoRA(rank=4, dropout=0.1), seed=seed)
        trainer.train()
        folders.append(artifact.save(trainer.injection, tmp_path / str(number), task=TASK.describe()))
    for name in (adapter_files.TENSORS, adapter_files.SETTINGS):
        first, second, other = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        assert first != other


def test_every_strategy_sees_the_same_batches_in_the_same_order(make):
    seen = []
    for strategy in STRATEGIES:
        batches = Batches()
        batches.watch(make(strategy, eval_strategy="no")).train()
        seen.append(batches.seen)
    assert len(seen[0]) == 3 * 6
    assert all(other == seen[0] for other in seen)
    assert seen[0][:6] != seen[0][6:12]


@pytest.mark.parametrize("task", [TASK, lightsft.task("chat")], ids=lambda task: task.name)
@pytest.mark.parametrize("strategy", [LoRA(rank=4), Full()], ids=short)
def test_accumulated_gradients_are_those_of_the_big_batch(make, llama, strategy, task):
    options = {"max_steps": 4, "eval_strategy": "no", "max_grad_norm": 0.0, "optim": "sgd", "task": task}
    options |= {"rows": labelled_rows(64)} if task is TASK else {"rows": chat_rows(64), "model": llama}
    finals = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = make(strategy, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(range(64))
        finals.append(trained(trainer))
    big, accumulated = finals
    for name in big:
        torch.testing.assert_close(accumulated[name], big[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=short)
def test_gradient_checkpointing_trains_to_the_same_tensors(make, strategy):
    finals = []
    for checkpointing in (False, True):
        trainer = make(strategy, max_steps=4, eval_strategy="no")
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        finals.append(trained(trainer))
    for name in finals[0]:
        torch.testing.assert_close(finals[1][name], finals[0][name], rtol=1e-4, atol=1e-5)


def test_training_in_bfloat16_keeps_float32_masters(make):
    for strategy in STRATEGIES:
        masters = "float32" if getattr(strategy, "trains_weights", False) else None
        trainer = make(strategy, loading={"dtype": "bfloat16", "weight_dtype": masters})
        computed = set()
        trainer.model.bert.encoder.layer[0].output.dense.register_forward_hook(
            lambda module, inputs, output, computed=computed: computed.add(output.dtype)
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert losses(trainer)[-1] < before - 0.05
        assert computed == {torch.bfloat16}, strategy
        assert {p.dtype for p in trainer.injection.parameters()} == {torch.float32}, strategy
        assert {tensor.dtype for tensor in trainer.injection.tensors().values()} <= {torch.float32, torch.bfloat16}
        assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}


# ---- the optimizer


def test_lora_plus_gives_b_a_higher_rate_throughout_the_schedule(make):
    rates = []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            rates.append(sorted({group["lr"] for group in optimizer.param_groups if group["params"]}))

    trainer = make(LoRA(rank=4, lora_plus_ratio=16.0), callbacks=[Rates()], warmup_steps=4, eval_strategy="no")
    trainer.train()
    named = trainer.injection.named_parameters()
    faster = {id(p) for group in trainer.optimizer.param_groups for p in group["params"] if group["initial_lr"] > 0.01}
    assert faster == {id(p) for name, p in named.items() if "lora_B" in name or name.endswith(".b")}
    assert len(rates) == 18
    for low, high in rates[:-1]:
        assert high == pytest.approx(16 * low)
    assert len({low for low, *_ in rates}) > 10


def test_every_trainable_tensor_is_in_the_optimizer_once(make):
    for strategy in STRATEGIES:
        trainer = make(strategy)
        optimizer = trainer.create_optimizer()
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in trainer.injection.parameters())


# ---- checkpoints


def test_a_resumed_run_ends_in_the_same_tensors_as_an_uninterrupted_one(make):
    class StopAfterTwo(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            control.should_training_stop = state.epoch >= 2

    strategy = LoRA(rank=4, dropout=0.2)
    options = {"num_train_epochs": 4, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    whole = trained(make(strategy, **options))
    first = make(strategy, callbacks=[StopAfterTwo()], **options)
    half = trained(first)
    assert first.state.epoch == 2
    resumed = make(strategy, **options)
    resumed.train(resume_from_checkpoint=True)
    assert not equal(half, whole)
    assert equal(dict(resumed.injection.tensors()), whole)


def test_the_best_checkpoint_is_kept_at_the_end(make):
    options = {"num_train_epochs": 4, "save_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    trainer = make(LoRA(rank=4), **options)
    trainer.train()
    found = losses(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-5)
    saved = adapter_files.read_tensors(Path(trainer.state.best_model_checkpoint))
    assert equal(saved, dict(trainer.injection.tensors()))


def test_a_checkpoint_is_an_adapter_folder(make, bert):
    trainer = make(LoRA(rank=4), save_strategy="epoch")
    trainer.train()
    (folder,) = Path(trainer.args.output_dir).glob("checkpoint-18")
    injection = lightsft.load(folder, Backbone.load(bert, labels=LABELS, dtype="float32", device="cpu"))
    assert equal(dict(injection.tensors()), dict(trainer.injection.tensors()))


def test_early_stopping_stops(make):
    options = {"num_train_epochs": 20, "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}
    callback = transformers.EarlyStoppingCallback(1)
    trainer = make(LoRA(rank=4), callbacks=[callback], metric_for_best_model="loss", learning_rate=1e-12, **options)
    trainer.train()
    assert trainer.state.epoch < 20


# ---- transformers' ways


def test_a_user_s_callbacks_are_called(make):
    called = []

    class Mine(TrainerCallback):
        def on_train_begin(self, *_, **__):
            called.append("begin")

        def on_step_end(self, args, state, *_, **__):
            called.append(state.global_step)

        def on_evaluate(self, args, state, control, metrics=None, **__):
            called.append(sorted(metrics))

    make(LoRA(rank=4), num_train_epochs=1, callbacks=[Mine()]).train()
    assert called[0] == "begin"
    assert called[1:7] == [1, 2, 3, 4, 5, 6]
    assert {"eval_accuracy", "eval_macro_f1", "eval_loss"} <= set(called[7])


def test_a_datasets_dataset_serves_as_rows(make):
    finals = [trained(make(LoRA(rank=4), rows=rows)) for rows in (ROWS, datasets.Dataset.from_list(ROWS))]
    assert equal(*finals)


def test_the_default_arguments_take_the_strategy_s_learning_rate(bert):
    backbone = Backbone.load(bert, labels=LABELS, dtype="float32", device="cpu")
    trainer = Trainer(LoRA(rank=4).inject(backbone), TASK, train=ROWS)
    assert trainer.args.learning_rate == LoRA.learning_rate


def test_the_scores_are_in_the_order_of_the_rows(make):
    trainer = make(LoRA(rank=4))
    _, together = trainer.score(ROWS[:20])
    alone = [trainer.score([row])[1][0] for row in ROWS[:20]]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_backbone_without_a_tokenizer_is_refused(bert):
    backbone = Backbone(Backbone.load(bert, labels=LABELS, device="cpu").model)
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        Trainer(LoRA().inject(backbone), TASK, train=ROWS)


def test_no_rows_are_refused(make):
    with pytest.raises(DataError, match="no rows"):
        make(LoRA(), rows=[])
