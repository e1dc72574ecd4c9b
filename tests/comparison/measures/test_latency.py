"""Latency of one row: which row it is, and that the time measured is the forward pass's own."""

import time

import pytest
import torch

import lightsft
from lightsft import Backbone
from lightsft.comparison.measures.latency import REPEATS, WARM_UPS, latency
from tests.checkpoints import LABELS, wordpiece_tokenizer
from tests.tiny_models import tiny

TASK = lightsft.task("classification", labels=LABELS)
ROWS = [{"text": "the film " * n, "label": "pos"} for n in (30, 1, 5, 2, 9)]


@pytest.fixture
def passes():
    """A tiny model, and the (rows, tokens) of every pass through it; each takes 5 ms more than the one before."""
    model, seen = tiny("bert"), []

    def watch(module, args, kwargs):
        seen.append(tuple(kwargs["attention_mask"].sum(1).tolist()))
        time.sleep(0.005 * len(seen))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    return model.train(), seen


def test_the_row_of_median_length_is_timed_without_the_warm_ups(passes):
    model, seen = passes
    found = latency(Backbone(model, tokenizer=wordpiece_tokenizer()), TASK, ROWS, repeats=5)
    assert seen == [(2 * 5 + 2,)] * (WARM_UPS + 5)  # words, [CLS] and [SEP], a batch of one
    assert 5 * 6 <= found["median_ms"] < 1000  # of the 4th to the 8th; of all eight it would be less
    assert found["median_ms"] < found["p90_ms"]
    assert model.training


def test_it_is_repeated_so_often_that_the_median_means_something():
    assert REPEATS >= 20
    model = tiny("bert")
    calls = []
    model.register_forward_hook(lambda *given: calls.append(torch.is_grad_enabled()))
    latency(Backbone(model, tokenizer=wordpiece_tokenizer()), TASK, ROWS)
    assert calls == [False] * (WARM_UPS + REPEATS)
