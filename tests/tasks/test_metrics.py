"""Scores equal scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics as reference

import lightsft
from lightsft.tasks.metrics import classification_scores, confusion_matrix, per_class_scores

CASES = {
    "balanced": (3, 200, None),
    "one example": (2, 1, None),
    "many classes, few examples": (12, 9, None),
    "one class is all there is": (4, 30, [0, 0, 1, 0]),
    "a class that never occurs": (4, 60, [0.5, 0.3, 0.2, 0]),
}


@pytest.fixture(params=list(CASES))
def case(request):
    """(truth, predicted, classes): random, right about half of the time."""
    classes, examples, shares = CASES[request.param]
    chance = np.random.default_rng(len(request.param))
    truth = chance.choice(classes, examples, p=shares)
    guessed = chance.choice(classes, examples, p=shares)
    return truth, np.where(chance.random(examples) < 0.5, truth, guessed), classes


def test_the_confusion_matrix_has_truth_in_rows(case):
    truth, predicted, classes = case
    expected = reference.confusion_matrix(truth, predicted, labels=range(classes))
    assert np.array_equal(confusion_matrix(truth, predicted, classes), expected)


def test_scores_equal_scikit_learn_s(case):
    truth, predicted, classes = case
    scores = classification_scores(confusion_matrix(truth, predicted, classes))
    assert scores["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    for average in ("macro", "micro"):
        found = reference.precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), found[:3], strict=True):
            if f"{average}_{name}" in scores:
                assert scores[f"{average}_{name}"] == pytest.approx(value), (average, name)


def test_micro_scores_are_the_accuracy(case):
    truth, predicted, classes = case
    found = reference.precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
    scores = classification_scores(confusion_matrix(truth, predicted, classes))
    assert found[:3] == pytest.approx([scores["accuracy"]] * 3)
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])


def test_per_class_scores_equal_scikit_learn_s(case):
    truth, predicted, classes = case
    labels = [f"class {number}" for number in range(classes)]
    expected = reference.classification_report(
        truth, predicted, labels=range(classes), target_names=labels, output_dict=True, zero_division=0
    )
    for label, row in per_class_scores(confusion_matrix(truth, predicted, classes), labels).items():
        wanted = expected[label]
        assert row["examples"] == wanted["support"]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(
            [wanted["precision"], wanted["recall"], wanted["f1-score"]]
        )


def test_the_loss_is_scikit_learn_s_log_loss():
    chance = np.random.default_rng(0)
    probabilities, truth = chance.dirichlet([1, 1, 1], 50), chance.integers(0, 3, 50)
    found = lightsft.task("classification", labels=["a", "b", "c"]).metrics(np.column_stack([probabilities, truth]))
    assert found["loss"] == pytest.approx(reference.log_loss(truth, probabilities, labels=range(3)))


def test_a_certain_mistake_has_a_finite_loss():
    found = lightsft.task("classification", labels=["a", "b"]).metrics(np.array([[1.0, 0.0, 1.0]]))
    assert np.isfinite(found["loss"])
    assert found["loss"] > 20
