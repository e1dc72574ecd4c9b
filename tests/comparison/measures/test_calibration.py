"""Calibration by its formulas in fp64, and a temperature that is known beforehand."""

import numpy as np
import pytest

import lightsft
from lightsft.comparison.measures.calibration import calibration, temperature, tempered
from lightsft.metrics.classification import log_loss
from tests.checkpoints import LABELS

TASK = lightsft.task("classification", labels=["a", "b", "c"])


def drawn(number, sharpness, seed=0):
    """Outcomes whose labels are drawn from softmax(z), and whose probabilities are softmax(sharpness z)."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(scale=1.5, size=(number, 3))
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (chance.random(number)[:, None] > honest.cumsum(axis=1)).sum(axis=1)
    said = np.exp(sharpness * logits)
    return np.column_stack([said / said.sum(axis=1, keepdims=True), truth])


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_temperature_is_by_how_much_a_model_is_too_sure(sharpness):
    found = calibration(TASK, drawn(20_000, sharpness), drawn(20_000, sharpness, seed=1))
    assert found["temperature"] == pytest.approx(sharpness, rel=0.05)
    assert found["ece_after_temperature"] < 0.015
    if sharpness != 1.0:
        assert found["ece"] > 5 * found["ece_after_temperature"]


def test_the_error_is_the_formula():
    outcomes = drawn(500, 2.0)
    confidence, right = outcomes[:, :-1].max(axis=1), outcomes[:, :-1].argmax(axis=1) == outcomes[:, -1]
    by_hand = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            by_hand += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration(TASK, outcomes, outcomes)
    assert found["ece"] == pytest.approx(by_hand)
    assert found["ece"] == pytest.approx(TASK.metrics(outcomes)["ece"])
    assert sum(one["count"] for one in found["bins"]) == 500
    weighted = sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in found["bins"])
    assert weighted / 500 == pytest.approx(by_hand)


def test_no_other_temperature_fits_validation_rows_better():
    outcomes = drawn(300, 3.0)
    probabilities, truth = outcomes[:, :-1], outcomes[:, -1].astype(int)
    best = temperature(probabilities, truth)
    losses = [log_loss(tempered(probabilities, value), truth) for value in np.geomspace(0.02, 50, 400)]
    assert log_loss(tempered(probabilities, best), truth) <= min(losses) + 1e-9


def test_a_temperature_is_softmax_of_logits_divided_by_it():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(axis=1, keepdims=True)
    assert tempered(probabilities, 2.5) == pytest.approx(expected)
    assert tempered(probabilities, 1.0) == pytest.approx(probabilities)


def test_certain_models_have_a_finite_temperature():
    certain = np.array([[1.0, 0.0, 0.0, 0], [0.0, 1.0, 0.0, 1], [0.0, 0.0, 1.0, 2]])
    found = calibration(TASK, certain, certain)
    assert 0.01 <= found["temperature"] < 1
    assert found["ece"] == 0.0
    mistaken = np.array([[1.0, 0.0, 0.0, 1], [0.0, 1.0, 0.0, 0], [0.0, 0.0, 1.0, 2]])
    assert calibration(TASK, mistaken, mistaken)["temperature"] > 10


def test_what_has_no_probabilities_has_no_calibration():
    numbers = np.array([[0.1, 0.2], [0.3, 0.2]])
    assert calibration(lightsft.task("regression"), numbers, numbers) is None
    several = np.array([[0.1, 0.2, 0.0, 1.0]])
    assert calibration(lightsft.task("multi-label", labels=LABELS), several, several) is None
    lost = np.array([[np.nan, np.nan, np.nan, 0]])
    assert calibration(TASK, drawn(10, 1.0), lost) is None
