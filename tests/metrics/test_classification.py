"""Scores equal scikit-learn's."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

import lightsft
from lightsft.metrics.classification import (
    area_under_roc,
    brier_score,
    calibration_error,
    classification_scores,
    confusion_matrix,
    log_loss,
    matthews_correlation,
    mean_average_precision,
    per_class_scores,
    probability_scores,
    reliability,
)

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
            assert scores[f"{average}_{name}"] == pytest.approx(value), (average, name)


def test_micro_scores_are_the_accuracy(case):
    truth, predicted, classes = case
    found = reference.precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
    scores = classification_scores(confusion_matrix(truth, predicted, classes))
    assert found[:3] == pytest.approx([scores["accuracy"]] * 3)
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])


def test_the_correlation_is_scikit_learn_s(case):
    truth, predicted, classes = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single label in both
        expected = reference.matthews_corrcoef(truth, predicted)
    assert matthews_correlation(confusion_matrix(truth, predicted, classes)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[5, 0], [0, 5]], 1.0),
        ([[0, 5], [5, 0]], -1.0),
        ([[6, 2], [1, 3]], (6 * 3 - 1 * 2) / np.sqrt(7 * 8 * 4 * 5)),
        ([[0, 9], [0, 1]], 0.0),  # always the same answer
        ([[7, 0], [0, 0]], 0.0),
    ],
)
def test_the_correlation_of_a_known_table(matrix, expected):
    assert matthews_correlation(np.array(matrix)) == pytest.approx(expected)


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


def drawn(classes, examples, seed, coarse):
    """(probabilities, truth) with every class occurring; few distinct probabilities, so ties, when coarse."""
    chance = np.random.default_rng(seed)
    truth = chance.permutation(np.arange(examples) % classes)
    scores = chance.integers(1, 4, (examples, classes)) if coarse else chance.random((examples, classes))
    scores = scores + 0.7 * (truth[:, None] == np.arange(classes))
    return scores / scores.sum(axis=1, keepdims=True), truth


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("classes", "examples"), [(2, 2), (2, 57), (3, 40), (7, 90)])
def test_the_area_under_the_curve_is_scikit_learn_s(classes, examples, coarse):
    probabilities, truth = drawn(classes, examples, classes, coarse)
    if classes == 2:
        expected = reference.roc_auc_score(truth, probabilities[:, 1])
    else:
        expected = reference.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    assert area_under_roc(probabilities, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("classes", "examples"), [(2, 57), (3, 40), (7, 90)])
def test_average_precision_is_scikit_learn_s(classes, examples, coarse):
    probabilities, truth = drawn(classes, examples, classes, coarse)
    columns = [1] if classes == 2 else range(classes)
    expected = np.mean([reference.average_precision_score(truth == k, probabilities[:, k]) for k in columns])
    assert mean_average_precision(probabilities, truth) == pytest.approx(expected, abs=1e-12)


def test_classes_that_do_not_occur_are_left_out_of_the_ranking_scores():
    probabilities, truth = drawn(4, 60, 0, False)
    rows = truth < 2
    expected = np.mean([reference.roc_auc_score(truth[rows] == k, probabilities[rows, k]) for k in (0, 1)])
    assert area_under_roc(probabilities[rows], truth[rows]) == pytest.approx(expected)


def test_ranking_scores_of_a_single_class_are_not_defined():
    probabilities, truth = drawn(3, 30, 0, False)
    for only in range(3):
        assert area_under_roc(probabilities[truth == only], truth[truth == only]) is None
    assert mean_average_precision(probabilities[:, :2], np.zeros(30, int)) is None  # no positive


def test_equal_scores_rank_neither_way():
    assert area_under_roc(np.full((10, 2), 0.5), np.arange(10) % 2) == 0.5


def test_brier_score_and_loss_are_scikit_learn_s():
    probabilities, truth = drawn(4, 50, 1, False)
    expected = reference.brier_score_loss(truth, probabilities, labels=range(4), scale_by_half=False)
    assert brier_score(probabilities, truth) == pytest.approx(expected)
    assert log_loss(probabilities, truth) == pytest.approx(reference.log_loss(truth, probabilities, labels=range(4)))
    binary, truth = drawn(2, 50, 1, False)
    assert brier_score(binary, truth) == pytest.approx(2 * reference.brier_score_loss(truth, binary[:, 1]))


def test_the_calibration_error_of_known_bins():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    truth = np.array([0, 1, 0, 0])
    expected = (2 * abs(0.5 - 0.9) + abs(1 - 0.6) + abs(0 - 0.7)) / 4
    assert calibration_error(probabilities, truth) == pytest.approx(expected)
    assert calibration_error(np.eye(2)[[0, 1]], np.array([0, 1])) == 0


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_the_sum_over_bins_of_the_paper(bins):
    probabilities, truth = drawn(3, 200, 2, True)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    expected = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(probabilities, truth, bins) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_a_bound_is_in_the_lower_bin():
    table = reliability(np.array([[0.8, 0.2], [1.0, 0.0]]), np.array([0, 0]), bins=5)
    assert table[:, 2].tolist() == [0, 0, 0, 1, 1]
    assert table[3].tolist() == pytest.approx([0.6, 0.8, 1, 0.8, 1])


def test_the_reliability_table_counts_every_example():
    probabilities, truth = drawn(3, 200, 2, False)
    table = reliability(probabilities, truth)
    assert table.shape == (15, 5)
    assert table[:, 2].sum() == 200
    assert (table[:, 2] * table[:, 4]).sum() / 200 == pytest.approx((probabilities.argmax(1) == truth).mean())


def test_a_probability_that_is_no_number_leaves_no_score():
    probabilities, truth = drawn(3, 20, 0, False)
    assert None not in probability_scores(probabilities, truth).values()
    probabilities[3, 1] = np.nan
    assert set(probability_scores(probabilities, truth).values()) == {None}
