"""A run lasts as long as its budget says, validates as often, and leaves a record of both."""

import math
import time
from itertools import islice

import pytest
import torch

from lightsft.config import SingleConfig, build
from lightsft.data.batching import SimilarLengths, TokenBudget
from lightsft.data.budget import tokens_of_updates, updates_for
from lightsft.errors import ConfigurationError, DivergedError
from lightsft.training.prepared import prepare
from lightsft.training.run import build_trainer, load_backbone
from lightsft_adapters import Adapter

LENGTHS = [3, 9, 4, 7, 12, 5, 6, 8, 2, 10, 11]


@pytest.fixture
def trainer_of(bert, rows_csv, tmp_path):
    """A trainer on 64 texts; its folder is new each time."""

    def make(**changes):
        values = {"model": str(bert), "data": str(rows_csv), "out": str(tmp_path / "out"), "dtype": "float32"}
        values |= {"max_train_examples": 64, "max_validation_examples": 16, "batch_size": 8, "epochs": 2}
        config = build(SingleConfig, values | changes)
        prepared = prepare(config)
        injection = Adapter().inject(load_backbone(config, prepared, Adapter(), 0))
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return build_trainer(config, prepared, injection, learning_rate=1e-3, seed=0, directory=folder, resumable=False)

    return make


@pytest.mark.parametrize("sampler", [SimilarLengths(LENGTHS, 2, 5), TokenBudget(LENGTHS, 24, 5)])
@pytest.mark.parametrize("together", [1, 3])
def test_every_epoch_reads_every_token_once(sampler, together):
    batches = 6 if isinstance(sampler, SimilarLengths) else len(sampler)
    updates = math.ceil(batches / together)
    read = list(islice(tokens_of_updates(sampler, LENGTHS, together), 2 * updates))
    assert sum(read[:updates]) == sum(read[updates:]) == sum(LENGTHS)
    assert read[:updates] != read[updates:]  # another order


def test_a_budget_in_tokens_is_the_fewest_updates_that_reach_it():
    assert updates_for(10, iter([4, 5, 1, 7])) == 3
    assert updates_for(11, iter([4, 5, 1, 7])) == 4
    assert updates_for(1, iter([4, 5])) == 1


@pytest.mark.parametrize("options", [{}, {"tokens_per_batch": 96}, {"gradient_accumulation": 3}], ids=str)
def test_tokens_on_record_are_those_that_were_read(trainer_of, monkeypatch, options):
    trainer = trainer_of(max_steps=11, evaluations=1, **options)
    read = []
    real = type(trainer).training_step

    def counted(self, model, inputs, *more):
        read.append(int(inputs["attention_mask"].sum()))
        return real(self, model, inputs, *more)

    monkeypatch.setattr(type(trainer), "training_step", counted)
    trainer.train()
    assert trainer.record.curve[-1]["tokens"] == sum(read)


def test_a_run_ends_where_its_tokens_are_spent(trainer_of):
    trainer = trainer_of(max_tokens=500)
    trainer.train()
    last = trainer.state.global_step
    assert trainer.record.tokens_after(last - 1) < 500 <= trainer.record.tokens_after(last)
    assert trainer.record.curve[-1]["step"] == last


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [8, 16]),
        ({"evaluations": 4}, [4, 8, 12, 16]),
        ({"max_steps": 10}, [2, 4, 6, 8, 10]),
        ({"max_steps": 7, "evaluations": 3}, [3, 5, 7]),
        ({"max_steps": 2, "evaluations": 5}, [1, 2]),
    ],
)
def test_validations_are_spread_evenly_and_the_last_is_at_the_end(trainer_of, options, steps):
    trainer = trainer_of(**options)
    trainer.train()
    assert [point["step"] for point in trainer.record.curve] == steps
    assert trainer.state.global_step == steps[-1]


def test_the_record_says_what_the_logs_say(trainer_of):
    trainer = trainer_of(max_steps=20, evaluations=2)
    trainer.train()
    validated = [log for log in trainer.state.log_history if "eval_accuracy" in log]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [point["score"] for point in trainer.record.curve] == [log["eval_accuracy"] for log in validated]
    assert [point["loss"] for point in trainer.record.curve] == pytest.approx(losses)
    seconds = [point["seconds"] for point in trainer.record.curve]
    assert 0 < seconds[0] < seconds[1] <= round(trainer.record.seconds, 3)


def test_the_time_to_a_target_is_that_of_the_first_validation_that_reaches_it(trainer_of):
    record = trainer_of().record
    record.curve = [{"score": score, "seconds": second} for score, second in ((0.4, 1.0), (0.7, 2.0), (0.6, 3.0))]
    assert record.seconds_to(0.5, greater_is_better=True) == 2.0
    assert record.seconds_to(0.4, greater_is_better=False) == 1.0
    assert record.seconds_to(0.9, greater_is_better=True) is None


def test_a_budget_in_minutes_ends_the_run_and_takes_the_rate_down_with_the_clock(trainer_of, monkeypatch):
    trainer = trainer_of(max_minutes=1, evaluations=2, warmup=0.0)
    clock = iter(range(0, 10_000, 5))  # each look at the clock is five seconds later
    monkeypatch.setattr("lightsft.training.progress.time.perf_counter", lambda: float(next(clock)))
    rates = []
    trainer.add_callback(_Rates(rates))
    trainer.train()
    assert trainer.state.global_step == 12  # of five seconds each
    assert [point["step"] for point in trainer.record.curve] == [6, 12]
    behind = [0, *range(11)]  # a schedule is set before the step that it follows is counted
    assert rates == pytest.approx([1e-3 * (1 - step / 12) for step in behind], rel=1e-3)


def test_a_schedule_that_knows_no_step_is_refused_under_a_clock(trainer_of):
    trainer = trainer_of(max_minutes=1, scheduler="reduce_lr_on_plateau")
    with pytest.raises(ConfigurationError, match="under a budget in minutes"):
        trainer.train()


def test_two_budgets_are_one_too_many(trainer_of):
    with pytest.raises(ConfigurationError, match="max_steps and max_minutes are two budgets; give one"):
        trainer_of(max_steps=3, max_minutes=1)


def test_a_loss_that_is_no_number_ends_the_run(trainer_of):
    trainer = trainer_of(max_steps=40)
    torch.nn.init.constant_(next(iter(trainer.injection.parameters())), float("nan"))
    began = time.perf_counter()
    with pytest.raises(DivergedError, match=r"loss is .* at step \d+ \(learning rate 0.001\)") as caught:
        trainer.train()
    assert "smaller learning rate" in caught.value.todo
    assert time.perf_counter() - began < 60


class _Rates:
    """Takes down the learning rate of each step; any other event is ignored."""

    def __init__(self, rates):
        self.rates = rates

    def on_optimizer_step(self, args, state, control, optimizer, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def __getattr__(self, name):
        return lambda *arguments, **options: None
