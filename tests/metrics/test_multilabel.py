"""Scores of any number of labels per example equal scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics as reference

from lightsft.metrics.multilabel import multilabel_per_class, multilabel_scores

SHAPES = [(1, 2), (40, 3), (25, 8), (200, 1)]


def drawn(examples, classes, seed=0, share=0.4):
    chance = np.random.default_rng(seed)
    truth = (chance.random((examples, classes)) < share).astype(float)
    probabilities = np.clip(chance.random((examples, classes)) * 0.7 + 0.3 * truth, 0, 1).round(1)
    return probabilities, truth


@pytest.mark.parametrize("share", [0.4, 0.05])
@pytest.mark.parametrize(("examples", "classes"), SHAPES)
def test_averages_equal_scikit_learn_s(examples, classes, share):
    probabilities, truth = drawn(examples, classes, share=share)
    predicted = probabilities >= 0.5
    scores = multilabel_scores(np.hstack([probabilities, truth]))
    averages = ("micro", "macro", "samples") if classes > 1 else ()
    for average in averages:
        expected = reference.precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
        found = [scores[f"{average}_{name}"] for name in ("precision", "recall", "f1")]
        assert found == pytest.approx(expected[:3], abs=1e-12), average
    assert scores["subset_accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    assert scores["hamming_loss"] == pytest.approx(reference.hamming_loss(truth, predicted))


@pytest.mark.parametrize(("examples", "classes"), SHAPES[1:])
def test_ranking_scores_equal_scikit_learn_s(examples, classes):
    probabilities, truth = drawn(examples, classes)
    scores = multilabel_scores(np.hstack([probabilities, truth]))
    assert scores["auroc"] == pytest.approx(reference.roc_auc_score(truth, probabilities, average="macro"))
    expected = reference.average_precision_score(truth, probabilities, average="macro")
    assert scores["average_precision"] == pytest.approx(expected)


def test_a_class_that_never_occurs_counts_for_f1_and_not_for_the_ranking():
    probabilities, truth = drawn(30, 3)
    truth[:, 1] = 0
    scores = multilabel_scores(np.hstack([probabilities, truth]))
    assert scores["auroc"] == pytest.approx(reference.roc_auc_score(truth[:, ::2], probabilities[:, ::2]))
    assert scores["macro_f1"] == pytest.approx(
        reference.f1_score(truth, probabilities >= 0.5, average="macro", zero_division=0)
    )
    row = multilabel_per_class(np.hstack([probabilities, truth]), ["a", "b", "c"])["b"]
    assert row["auroc"] is None
    assert (row["recall"], row["examples"]) == (0, 0)


@pytest.mark.parametrize(("examples", "classes"), SHAPES[1:3])
def test_scores_of_a_class_equal_scikit_learn_s(examples, classes):
    probabilities, truth = drawn(examples, classes)
    predicted = probabilities >= 0.5
    expected = reference.precision_recall_fscore_support(truth, predicted, zero_division=0)
    rows = multilabel_per_class(np.hstack([probabilities, truth]), [str(k) for k in range(classes)])
    for k, row in enumerate(rows.values()):
        wanted = [column[k] for column in expected]
        assert [row[name] for name in ("precision", "recall", "f1", "examples")] == pytest.approx(wanted)
        assert row["auroc"] == pytest.approx(reference.roc_auc_score(truth[:, k], probabilities[:, k]))


def test_the_threshold_belongs_to_the_positives():
    outcomes = np.array([[0.5, 0.49, 1, 0]])
    assert multilabel_scores(outcomes)["subset_accuracy"] == 1
    assert multilabel_scores(outcomes, threshold=0.51)["micro_recall"] == 0
