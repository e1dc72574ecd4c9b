"""The area under the ROC curve is a share of pairs; average precision a sum over thresholds."""

import numpy as np
import pytest
from sklearn import metrics as reference

from lightsft.metrics.arrays import average_ranks, mean_or_none, ratio
from lightsft.metrics.ranking import auroc, average_precision


@pytest.mark.parametrize("seed", range(8))
def test_the_area_is_the_share_of_ordered_pairs(seed):
    chance = np.random.default_rng(seed)
    scores, truth = chance.integers(0, 6, 40), np.append(chance.integers(0, 2, 38), [0, 1])
    pairs = scores[truth == 1][:, None] - scores[truth == 0]
    assert auroc(scores, truth) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auroc(scores, truth) == pytest.approx(reference.roc_auc_score(truth, scores))
    assert average_precision(scores, truth) == pytest.approx(reference.average_precision_score(truth, scores))


def test_average_precision_by_hand():
    truth = np.array([1, 0, 1, 0])
    assert average_precision(np.array([4.0, 3, 2, 1]), truth) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 1, 1, 1]), truth) == 0.5  # all come in at once


def test_what_is_not_defined_is_not_a_number():
    scores = np.array([0.1, 0.2])
    assert np.isnan(auroc(scores, np.array([1, 1])))
    assert np.isnan(auroc(scores, np.array([0, 0])))
    assert np.isnan(average_precision(scores, np.array([0, 0])))
    assert np.isnan(auroc(np.array([np.nan, 0.2]), np.array([0, 1])))
    assert np.isnan(average_precision(np.array([np.nan, 0.2]), np.array([0, 1])))


def test_pieces():
    assert average_ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert ratio(np.array([1, 2]), np.array([0, 4])).tolist() == [0, 0.5]
    assert mean_or_none(np.array([np.nan])) is None
    assert mean_or_none(np.array([np.nan, 3])) == 3
