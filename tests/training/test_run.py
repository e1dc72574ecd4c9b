"""From a configuration to a finished run: splits, learning rates, stopping, continuing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from lightsft.config import SingleConfig, StrategySpec, build
from lightsft.errors import ConfigurationError, DataError
from lightsft.training import single as singles
from lightsft.training.prepared import prepare
from lightsft.training.run import build_trainer, load_backbone
from lightsft_adapters import Full, LoRA, Prefix
from lightsft_adapters.combined import Combined
from lightsft_adapters.p_tuning import PTuning
from lightsft_adapters.prompt import Prompt
from tests.checkpoints import labelled_rows, write_csv
from tests.run_fixtures import single


@pytest.fixture
def config(bert, rows_csv, tmp_path):
    """The configuration of a short run, with changes."""

    def make(**changes):
        return build(SingleConfig, {**single(bert, rows_csv, tmp_path / "out"), **changes})

    return make


@pytest.fixture
def trainer_of(tmp_path):
    """The trainer of a configuration."""

    def make(config, strategy=None, **options):
        prepared = prepare(config)
        strategy = strategy or LoRA(rank=2)
        injection = strategy.inject(load_backbone(config, prepared, strategy, 0), seed=0)
        options = {"learning_rate": None, "seed": 0, "resumable": False, **options}
        return build_trainer(config, prepared, injection, directory=tmp_path / "checkpoints", **options)

    return make


# ---- data


def test_limits_hold_for_every_split(config):
    limits = {"max_train_examples": 20, "max_validation_examples": 10, "max_test_examples": 5}
    splits = prepare(config(**limits)).splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 10, 5]


def test_files_of_their_own_are_taken_whole(config, tmp_path):
    rows = labelled_rows(30, seed=7)
    own = write_csv(tmp_path / "own.csv", rows)
    both = prepare(config(validation_data=str(own), test_data=str(own), max_train_examples=None)).splits
    assert both.validation == both.test == rows
    assert len(both.train) == 300
    one = prepare(config(test_data=str(own), max_train_examples=None)).splits
    assert one.test == rows
    assert len(one.train) + len(one.validation) == 300
    assert 15 <= len(one.validation) <= 50


def test_a_label_that_only_occurs_in_a_file_of_its_own_is_refused_with_its_row(config, tmp_path):
    own = write_csv(tmp_path / "own.csv", [*labelled_rows(4), {"text": "so so", "label": "meh"}])
    with pytest.raises(DataError, match=r"own.csv: row 5 has the label 'meh'"):
        prepare(config(validation_data=str(own)))


def test_labels_given_in_an_order_keep_it(config):
    assert prepare(config(labels="pos,neg")).task.labels == ("pos", "neg")


def test_a_tokenizer_without_a_limit_still_protects_the_model(config, bert, tmp_path):
    free = shutil.copytree(bert, tmp_path / "free")
    settings = json.loads((free / "tokenizer_config.json").read_text())
    settings.pop("model_max_length")
    (free / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match=r"up to 128 tokens, but .* reads 64"):
        load_backbone(config(model=str(free)), prepare(config()), None, 0)
    assert load_backbone(config(model=str(free), max_length=64), prepare(config()), None, 0)


@pytest.mark.parametrize(
    "strategy", [Prompt(20), PTuning(20), Combined([LoRA(2), Prompt(20)])], ids=lambda value: type(value).__name__
)
def test_virtual_tokens_count_among_the_positions(strategy, config):
    with pytest.raises(
        ConfigurationError, match=r"up to 60 tokens, but .* reads 44 beside 20 virtual tokens"
    ) as caught:
        load_backbone(config(max_length=60), prepare(config(max_length=60)), strategy, 0)
    assert "--max-length 40" in caught.value.todo
    backbone = load_backbone(config(max_length=40), prepare(config(max_length=40)), strategy, 0)
    injection = strategy.inject(backbone)
    with torch.no_grad():
        assert injection.model(input_ids=torch.full((1, 44), 7)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            injection.model(input_ids=torch.full((1, 45), 7))


def test_a_prefix_takes_no_position(config):
    backbone = load_backbone(config(max_length=64), prepare(config(max_length=64)), Prefix(20), 0)
    injection = Prefix(20).inject(backbone)
    with torch.no_grad():
        assert injection.model(input_ids=torch.full((1, 64), 7)).logits.isfinite().all()


def test_more_virtual_tokens_than_positions_are_refused(config):
    with pytest.raises(ConfigurationError, match=r"64 virtual tokens, but .* reads 64 tokens in all"):
        load_backbone(config(max_length=8), prepare(config(max_length=8)), Prompt(64), 0)


# ---- precision


@pytest.mark.parametrize(
    ("strategy", "weights"), [(Full(), torch.float32), (Full(targets="head"), torch.bfloat16), (LoRA(), torch.bfloat16)]
)
def test_weights_are_float32_only_where_they_are_trained(config, strategy, weights):
    backbone = load_backbone(config(dtype="bfloat16"), prepare(config()), strategy, 0)
    assert backbone.model.bert.encoder.layer[0].output.dense.weight.dtype == weights
    assert backbone.compute_dtype == torch.bfloat16


# ---- the optimizer's settings


@pytest.mark.parametrize(
    ("of_the_strategy", "of_the_run", "expected"),
    [(None, None, LoRA.learning_rate), (None, 3e-3, 3e-3), (7e-3, None, 7e-3), (7e-3, 3e-3, 7e-3)],
)
def test_the_nearest_learning_rate_holds(config, trainer_of, of_the_strategy, of_the_run, expected):
    trainer = trainer_of(config(learning_rate=of_the_run), learning_rate=of_the_strategy)
    assert trainer.args.learning_rate == expected


def test_warmup_is_a_share_of_the_steps(config, trainer_of):
    trainer = trainer_of(config(warmup=0.25, scheduler="constant_with_warmup", learning_rate=1.0))
    trainer.create_optimizer_and_scheduler(num_training_steps=40)
    rates = []
    for _ in range(40):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert set(rates[10:]) == {1.0}


def test_the_configuration_reaches_the_trainer(config, trainer_of):
    values = {"batch_size": 5, "evaluation_batch_size": 7, "gradient_accumulation": 3, "weight_decay": 0.1}
    values |= {"max_gradient_norm": 0.5, "optimizer": "sgd", "scheduler": "cosine", "epochs": 1.5}
    args = trainer_of(config(**values, metric="loss")).args
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (5, 7)
    assert (args.gradient_accumulation_steps, args.weight_decay, args.max_grad_norm) == (3, 0.1, 0.5)
    assert (args.optim, args.lr_scheduler_type, args.num_train_epochs) == ("sgd", "cosine", 1.5)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


def test_gradient_checkpointing_is_switched_on(config, trainer_of):
    assert trainer_of(config(gradient_checkpointing=True)).model.is_gradient_checkpointing
    assert not trainer_of(config()).model.is_gradient_checkpointing


def test_early_stopping_ends_the_run(config, trainer_of):
    trainer = trainer_of(config(early_stopping=2, epochs=30, learning_rate=1e-12))
    trainer.train()
    assert trainer.state.epoch <= 4


def test_the_best_epoch_by_the_chosen_metric_is_kept(config, trainer_of):
    trainer = trainer_of(config(metric="loss", learning_rate=0.2, epochs=5, scheduler="constant"))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) < len(losses) - 1, "the test wants a run that gets worse"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


# ---- lightsft train


def test_an_interrupted_run_continues_to_the_same_bytes(config, monkeypatch, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if state.epoch >= 2:
                raise KeyboardInterrupt

    def interrupted(*arguments, **options):
        return build_trainer(*arguments, **options, callbacks=[Interrupt()])

    said = []
    whole, parts = config(epochs=4, out=str(tmp_path / "whole")), config(epochs=4, out=str(tmp_path / "parts"))
    singles.train(whole, say=said.append)
    assert not [text for text in said if "continuing" in text]
    with monkeypatch.context() as patch:
        patch.setattr(singles, "build_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            singles.train(parts, say=said.append)
    assert not (parts.out / "adapter_model.safetensors").exists()
    singles.train(parts, say=said.append)
    assert [text for text in said if "continuing from" in text and "checkpoint-4" in text]
    for name in ("adapter_model.safetensors", "lightsft.json", "scores.json"):
        assert (whole.out / name).read_bytes() == (parts.out / name).read_bytes(), name


def test_a_checkpoint_that_was_cut_short_is_passed_over(config, tmp_path):
    folder = tmp_path / "checkpoints"
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"epo'), (12, None)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        if state is not None:
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert singles._last_checkpoint(folder) == folder / "checkpoint-10"
    assert singles._last_checkpoint(tmp_path / "nowhere") is None


def test_two_runs_write_the_same_bytes(config, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        singles.train(config(strategy="lora(rank=2, dropout=0.1)", out=str(folder)), say=lambda text: None)
    for name in ("adapter_model.safetensors", "lightsft.json", "scores.json"):
        assert len({Path(folder / name).read_bytes() for folder in folders}) == 1, name


def test_the_default_strategy_is_lora(config):
    assert build(SingleConfig, {"model": "m", "data": "d", "out": "o"}).strategy == StrategySpec.parse("lora")
