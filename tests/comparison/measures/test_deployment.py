"""A strategy in use: merged scores equal unmerged ones, codes again are what an export stores, and what cannot be."""

import pytest

import lightsft
from lightsft import Backbone
from lightsft.comparison.measures import deployment as measured
from lightsft.comparison.measures.deployment import deployment
from lightsft.errors import MergeError
from lightsft.export.storing import onto_codes
from lightsft.quantization import Quantization, describe
from lightsft.training.evaluate import score_model
from lightsft_adapters import Adapter, LoRA
from tests.checkpoints import LABELS, chat_rows, labelled_rows
from tests.tiny_models import randomise

TASK, ROWS = lightsft.task("classification", labels=LABELS), labelled_rows(60)


def tuned(bert, strategy):
    return randomise(strategy.inject(Backbone.load(bert, labels=LABELS, dtype="float32", device="cpu")))


def test_what_merges_is_timed_and_scored_both_ways(bert):
    injection = tuned(bert, LoRA(4))
    before = score_model(injection.backbone, TASK, ROWS, 16)
    found = deployment(injection, TASK, ROWS, "loss", 16)
    assert found["merged"]["validation"] == pytest.approx(before["loss"], rel=1e-4)
    assert found["merged"]["requantized"] is None
    assert found["note"] is None
    for times in found["latency"].values():
        assert 0 < times["median_ms"] <= times["p90_ms"]
    assert injection.backbone.carries is None


def test_what_does_not_merge_is_timed_beside_the_model_alone(bert):
    injection = tuned(bert, Adapter(reduction_factor=4))
    found = deployment(injection, TASK, ROWS, "accuracy", 16)
    assert found["merged"] is None
    assert found["latency"]["merged"] is None
    assert found["latency"]["adapter"]["median_ms"] > 0
    assert "Adapter" in found["note"]
    assert injection.backbone.carries == "Adapter"


def test_an_error_of_ours_becomes_a_note(bert, monkeypatch):
    injection = tuned(bert, LoRA(4))

    def refuses(*given):
        raise MergeError("this one does not", expected="another", todo="take it")

    monkeypatch.setattr(injection, "merge", refuses)
    found = deployment(injection, TASK, ROWS, "accuracy", 16)
    assert found["merged"] is None
    assert found["note"] == "this one does not"
    assert found["latency"]["adapter"]["median_ms"] > 0


def test_a_score_that_is_no_number_is_none(bert, monkeypatch):
    monkeypatch.setattr(measured, "outcomes_of", lambda *given: TASK.constant_outcomes(ROWS, ROWS[1::2]))
    found = deployment(tuned(bert, LoRA(4)), TASK, ROWS, "auroc", 16)  # of a single class
    assert found["merged"] == {"validation": None, "requantized": None}


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_of_a_base_in_codes_the_merged_weights_are_stored_in_codes_again(how, llama):
    task, rows = lightsft.task("chat"), chat_rows(12)

    def trained():
        backbone = Backbone.load(llama, task="chat", dtype="float32", device="cpu", quantization=how)
        return randomise(LoRA(4).inject(backbone), scale=0.02)

    injection = trained()
    found = deployment(injection, task, rows, "loss", 4)
    assert describe(injection.model) == how
    stored = onto_codes(trained(), Quantization(how), float("inf"), 0, "somewhere")
    exported = score_model(Backbone(stored.backbone.model, tokenizer=injection.backbone.tokenizer), task, rows, 4)
    assert found["merged"]["requantized"] == pytest.approx(exported["loss"], rel=1e-5)
    plain = trained()
    plain.merge()
    assert found["merged"]["validation"] == pytest.approx(score_model(plain.backbone, task, rows, 4)["loss"], rel=1e-5)
    assert found["merged"]["requantized"] != found["merged"]["validation"]
