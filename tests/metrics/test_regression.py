"""Scores of predicted numbers equal scipy's and scikit-learn's."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from lightsft.metrics.regression import pearson, regression_scores, spearman


@pytest.fixture(params=["continuous", "tied", "two", "large numbers", "small numbers", "against each other"])
def pairs(request):
    chance = np.random.default_rng(0)
    truth = chance.random(60) * 5
    predicted = truth + chance.normal(size=60)
    return {
        "continuous": np.column_stack([predicted, truth]),
        "tied": np.column_stack([predicted, truth]).round(),
        "two": np.array([[1.0, 2.0], [4.0, 3.0]]),
        "large numbers": np.column_stack([predicted, truth]) * 1e8 + 1e9,
        "small numbers": np.column_stack([predicted, truth]) * 1e-8,
        "against each other": np.column_stack([-predicted, truth]),
    }[request.param]


def test_scores_equal_scipy_s_and_scikit_learn_s(pairs):
    predicted, truth = pairs.T
    assert regression_scores(pairs) == pytest.approx(
        {
            "pearson": stats.pearsonr(predicted, truth)[0],
            "spearman": stats.spearmanr(predicted, truth)[0],
            "rmse": reference.root_mean_squared_error(truth, predicted),
            "mae": reference.mean_absolute_error(truth, predicted),
            "r2": reference.r2_score(truth, predicted),
        }
    )


def test_outcomes_in_single_precision_are_summed_in_double():
    pairs = (np.random.default_rng(0).random((1000, 2)) + 1e4).astype(np.float32)
    expected = stats.pearsonr(*pairs.T.astype(float))[0]
    assert regression_scores(pairs)["pearson"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9])
def test_a_constant_has_no_correlation(value):
    truth = np.random.default_rng(0).random(7)
    found = regression_scores(np.column_stack([np.full(7, value), truth]))
    assert found["pearson"] is None
    assert found["spearman"] is None
    assert found["r2"] == pytest.approx(reference.r2_score(truth, np.full(7, value)))
    found = regression_scores(np.column_stack([truth, np.full(7, value)]))
    assert found["pearson"] is None
    assert found["r2"] is None
    assert found["mae"] == pytest.approx(np.abs(truth - value).mean())


def test_one_example_has_errors_alone():
    found = regression_scores(np.array([[1.0, 3.0]]))
    assert found == {"pearson": None, "spearman": None, "rmse": 2.0, "mae": 2.0, "r2": None}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_no_number_leaves_no_score(value):
    found = regression_scores(np.array([[1.0, 2.0], [value, 3.0], [2.0, 5.0]]))
    assert set(found.values()) == {None}


def test_the_correlation_neither_overflows_nor_leaves_its_range():
    x = np.array([1.0, 2.0, 3.0])
    assert pearson(x * 1e200, x) == pytest.approx(1)
    assert pearson(x * 1e-200, x) == pytest.approx(1)
    chance = np.random.default_rng(0)
    for _ in range(200):
        values = chance.random(3)
        assert pearson(values, values * 3) <= 1


def test_ties_share_their_rank():
    assert spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(np.sqrt(3) / 2)
