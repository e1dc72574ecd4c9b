"""Linear models on given features, their penalty chosen on validation rows.

    classes of which one is right    p = softmax(W x + b), multinomial logistic regression with |W|^2 / (2 C)
    any number of classes            p_k = sigmoid(w_k x + b_k), one against the rest, with |w_k|^2 / (2 C)
    a number                         y = w x + b, ridge regression with |w|^2 / C

Which of them it is follows from the truth: (rows,) whole numbers, (rows, classes) of 0 and 1, (rows,) other numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightsft.metrics.classification import LEAST_PROBABILITY
from lightsft.tasks.base import Array

Predictor = Callable[[Any], Array]
MOST_STEPS = 1000


@dataclass(frozen=True)
class Given:
    """features: (rows, width), dense or sparse. truth: what the task's `truth` gives of the same rows."""

    features: Any
    truth: Array


@dataclass(frozen=True)
class Fitted:
    """The chosen model, its C, and the outcomes of the rows that it was chosen on."""

    predict: Predictor
    strength: float
    validation: Array


def choose(
    train: Given,
    validation: Given,
    strengths: Sequence[float],
    score: Callable[[Array], Any],
    *,
    classes: int,
    weights: Sequence[float] | None = None,
) -> Fitted:
    """The C whose outcomes on the validation rows score best (anything ordered); of equal ones the smallest."""
    found: tuple[Any, Fitted] | None = None
    for strength in sorted(strengths):
        predict = fit(train, strength, classes=classes, weights=weights)
        outcomes = np.column_stack([predict(validation.features), validation.truth])
        value = score(outcomes)
        if found is None or value > found[0]:
            found = value, Fitted(predict, strength, outcomes)
    assert found is not None
    return found[1]


def fit(train: Given, strength: float, *, classes: int, weights: Sequence[float] | None = None) -> Predictor:
    """A function from features to what stands beside the truth in outcomes.

    weights: of the classes, or where several may be right of the examples with each class.
    """
    if train.truth.ndim == 2:
        with_class = weights or [1.0] * classes
        each = [
            _logistic(train.features, train.truth[:, k].astype(int), strength, 2, [1.0, with_class[k]])
            for k in range(classes)
        ]
        return lambda features: np.column_stack([predict(features)[:, 1] for predict in each])
    if np.issubdtype(train.truth.dtype, np.integer):
        return _logistic(train.features, train.truth, strength, classes, weights)
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1 / strength).fit(train.features, train.truth)
    return lambda features: np.asarray(model.predict(features))


def _logistic(features: Any, truth: Array, strength: float, classes: int, weights: Sequence[float] | None) -> Predictor:
    """(rows, classes) probabilities; a class without a training row has LEAST_PROBABILITY."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    there = np.unique(truth)
    if len(there) == 1:
        return lambda features: _spread(np.ones((features.shape[0], 1)), there, classes)
    by_class = None if weights is None else {int(label): weights[label] for label in there}
    model = LogisticRegression(C=strength, max_iter=MOST_STEPS, class_weight=by_class)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after so many steps it is as good as it needs to be
        model.fit(features, truth)
    return lambda features: _spread(model.predict_proba(features), model.classes_, classes)


def _spread(probabilities: Array, there: Array, classes: int) -> Array:
    """The columns of the classes that occur among those of all."""
    wide = np.zeros((len(probabilities), classes))
    wide[:, there] = probabilities
    return np.clip(wide, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
