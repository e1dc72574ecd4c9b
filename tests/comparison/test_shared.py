"""What trials share changes nothing of what they compute."""

import json
import os

import psutil
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lightsft import registry
from lightsft.backbone import Backbone
from lightsft.comparison import shared
from lightsft.comparison.compare import compare
from lightsft.config import RunConfig, StrategySpec, build
from tests.comparison.conftest import InProcess
from tests.comparison.test_compare import settings
from tests.tiny_models import NAMES, tiny


@pytest.fixture
def config(bert, rows_csv, tmp_path):
    return build(RunConfig, settings(bert, rows_csv, tmp_path / "out"))


@pytest.fixture
def held(config):
    """Rows, tokens and a base that are held for the adapter."""
    _hold(config, "adapter")
    yield config
    shared.forget()


def _hold(config, name):
    spec = StrategySpec(name=name, label=name)
    shared.hold_for("trial", {"config": config.model_dump(mode="json"), "spec": spec.model_dump(mode="json")})


def _state(backbone):
    return {name: value.clone() for name, value in backbone.model.state_dict().items()}


@pytest.mark.parametrize("seed", [0, 3])
def test_a_held_base_is_the_one_that_would_be_loaded(held, seed):
    strategy, prepared = registry.strategy("adapter"), shared.prepared_for(held)
    found, size = shared.backbone_for(held, prepared, strategy, seed)
    loaded = Backbone.load(held.model, labels=prepared.task.labels, dtype="float32", seed=seed)
    assert size > 0
    assert _state(found).keys() == _state(loaded).keys()
    assert all(torch.equal(one, _state(loaded)[name]) for name, one in _state(found).items())


def test_held_tokens_are_those_that_the_task_makes(held):
    prepared = shared.prepared_for(held)
    backbone = Backbone.load(held.model, labels=prepared.task.labels)
    for name, rows in prepared.splits.named().items():
        assert shared.encoded_for(held, backbone.tokenizer)[name].features == prepared.task.encode(
            rows, backbone.tokenizer
        )


def test_tokens_are_made_anew_for_a_tokenizer_that_grew(held):
    backbone = Backbone.load(held.model, labels=shared.prepared_for(held).task.labels)
    backbone.tokenizer.add_tokens(["entirelynew"])
    assert shared.encoded_for(held, backbone.tokenizer) == {}


def test_training_rows_that_each_seed_draws_are_not_shared(held):
    few = held.model_copy(update={"shots": 2})
    tokenizer = Backbone.load(held.model, labels=shared.prepared_for(held).task.labels).tokenizer
    assert set(shared.encoded_for(few, tokenizer)) == {"validation", "test"}


def test_another_configuration_finds_nothing(held):
    other = held.model_copy(update={"max_length": 16})
    assert shared.encoded_for(other, None) == {}
    _hold(other, "adapter")
    assert shared.encoded_for(held, None) == {}


def test_weights_that_are_trained_in_place_have_a_base_of_their_own_type(held):
    _hold(held.model_copy(update={"dtype": "bfloat16"}), "full")
    assert len(shared._held.bases) == 1
    ((backbone, _),) = shared._held.bases.values()
    assert backbone.stored_dtype == torch.float32


def test_what_cannot_be_held_is_left_to_the_job(config, capsys):
    _hold(config.model_copy(update={"model": "./nowhere"}), "adapter")
    assert "not shared" in capsys.readouterr().out
    assert not shared._held.prepared


@pytest.mark.parametrize("family", NAMES)
def test_a_renewed_head_is_the_one_of_that_seed(family, tmp_path):
    tiny(family).base_model.save_pretrained(tmp_path)
    options = {"kind": AutoModelForSequenceClassification, "labels": ["a", "b", "c"], "dtype": "float32"}
    one, other = (Backbone.load(tmp_path, seed=seed, **options) for seed in (0, 7))
    assert one.fresh
    one.renew(7)
    for (name, mine), theirs in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_trials_that_share_end_like_trials_that_do_not(bert, rows_csv, tmp_path, quantization, monkeypatch):
    values = settings(bert, rows_csv, tmp_path / "shared", strategies=["adapter", "lora"], epochs=1)
    values |= {"quantization": quantization, "dtype": "bfloat16" if quantization else "float32", "jobs": 2}
    together = compare(**values)
    monkeypatch.setattr("lightsft.comparison.compare.Worker", lambda at_once: InProcess())  # which holds nothing
    apart = compare(**values | {"out": str(tmp_path / "apart"), "jobs": 1})
    for one, other in zip(together["trials"], apart["trials"], strict=True):
        assert one["test"]["loss"] == pytest.approx(other["test"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_children_compute_in_several_threads_though_their_parent_does_not(tmp_path, bert, rows_csv):
    """A parent that had used a thread pool would hand on one without threads, and its children would wait for ever."""
    values = settings(bert, rows_csv, tmp_path / "out", strategies=["full"], seeds=2, quantization=None, epochs=1)
    os.environ.pop("OMP_NUM_THREADS", None)
    assert [trial["status"] for trial in compare(**values)["trials"]] == ["finished"] * 2


@pytest.mark.slow
def test_the_peak_of_a_trial_counts_the_base_that_was_there_before(tmp_path):
    from lightsft.demo import demo_config

    config = demo_config(tmp_path / "out").model_copy(update={"epochs": 0.2, "seeds": 1})
    kept = [spec for spec in config.strategies if spec.label in ("full", "lora")]
    results = compare(type(config)(**{**config.model_dump(), "strategies": kept}))
    weights = 22_700_000
    full, lora = (trial["peak_bytes"] for trial in results["trials"])
    assert full > 4 * 4 * weights  # values, gradients, two moments, all in fp32
    assert 2 * weights < lora < full
    assert full < psutil.virtual_memory().total
    assert json.dumps(results)
