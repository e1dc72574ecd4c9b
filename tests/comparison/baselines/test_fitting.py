"""Penalised linear models: scikit-learn's own by hand, the closed form in fp64, classes that training rows lack."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from lightsft.comparison.baselines.fitting import Given, choose, fit
from lightsft.metrics.classification import LEAST_PROBABILITY

CHANCE = np.random.default_rng(0)
FEATURES = CHANCE.normal(size=(120, 6))
MIXED = FEATURES @ CHANCE.normal(size=(6, 3)) + CHANCE.normal(size=(120, 3))
CLASSES, SEVERAL, NUMBERS = MIXED.argmax(axis=1), (MIXED > 0).astype(float), MIXED[:, 0]


def test_one_of_several_classes_is_multinomial_logistic_regression():
    said = fit(Given(FEATURES, CLASSES), 0.5, classes=3)(FEATURES)
    reference = LogisticRegression(C=0.5, max_iter=1000).fit(FEATURES, CLASSES).predict_proba(FEATURES)
    assert said == pytest.approx(reference, abs=1e-9)
    assert said.sum(axis=1) == pytest.approx(1.0)


def test_any_number_of_classes_is_one_against_the_rest():
    said = fit(Given(FEATURES, SEVERAL), 0.5, classes=3)(FEATURES)
    reference = OneVsRestClassifier(LogisticRegression(C=0.5, max_iter=1000)).fit(FEATURES, SEVERAL)
    assert said == pytest.approx(reference.predict_proba(FEATURES), abs=1e-9)


def test_numbers_are_the_closed_form_of_ridge_regression():
    said = fit(Given(FEATURES, NUMBERS), 0.25, classes=1)(FEATURES)
    centred = FEATURES - FEATURES.mean(axis=0)
    slope = np.linalg.solve(centred.T @ centred + 4 * np.eye(6), centred.T @ (NUMBERS - NUMBERS.mean()))
    assert said == pytest.approx(centred @ slope + NUMBERS.mean(), abs=1e-9)


def test_a_class_that_training_rows_lack_is_all_but_impossible():
    seen = CLASSES != 1
    said = fit(Given(FEATURES[seen], CLASSES[seen]), 1.0, classes=3)(FEATURES)
    assert said.shape == (120, 3)
    assert (said[:, 1] == LEAST_PROBABILITY).all()
    reference = LogisticRegression(C=1.0, max_iter=1000).fit(FEATURES[seen], CLASSES[seen]).predict_proba(FEATURES)
    assert said[:, [0, 2]] == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize("column", [0.0, 1.0])
def test_a_single_answer_in_training_is_the_answer(column):
    truth = SEVERAL.copy()
    truth[:, 1] = column
    said = fit(Given(FEATURES, truth), 1.0, classes=3)(FEATURES)
    assert said[:, 1] == pytest.approx(column, abs=1e-11)
    assert ((said > 0) & (said < 1)).all()
    one = fit(Given(FEATURES, np.full(120, 2)), 1.0, classes=3)(FEATURES)
    assert one.argmax(axis=1).tolist() == [2] * 120


def test_weights_of_classes_weigh_their_examples():
    weights = [1.0, 5.0, 0.5]
    said = fit(Given(FEATURES, CLASSES), 0.5, classes=3, weights=weights)(FEATURES)
    by_row = LogisticRegression(C=0.5, max_iter=1000)
    by_row.fit(FEATURES, CLASSES, sample_weight=[weights[label] for label in CLASSES])
    assert said == pytest.approx(by_row.predict_proba(FEATURES), abs=1e-6)
    several = fit(Given(FEATURES, SEVERAL), 0.5, classes=3, weights=weights)(FEATURES)
    by_row.fit(FEATURES, SEVERAL[:, 1], sample_weight=np.where(SEVERAL[:, 1] > 0, 5.0, 1.0))
    assert several[:, 1] == pytest.approx(by_row.predict_proba(FEATURES)[:, 1], abs=1e-6)


def test_the_penalty_that_scores_best_on_validation_rows_is_taken():
    train, validation = Given(FEATURES[:30], CLASSES[:30]), Given(FEATURES[30:], CLASSES[30:])
    strengths = (1e-3, 1e-1, 10.0, 1e3)

    def likelihood(outcomes):
        return float(np.log(outcomes[np.arange(len(outcomes)), outcomes[:, -1].astype(int)]).mean())

    by_hand = {}
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=1000).fit(train.features, train.truth)
        by_hand[strength] = np.log(model.predict_proba(validation.features)[np.arange(90), validation.truth]).mean()
    fitted = choose(train, validation, strengths, likelihood, classes=3)
    assert fitted.strength == max(by_hand, key=by_hand.__getitem__)
    assert likelihood(fitted.validation) == pytest.approx(by_hand[fitted.strength])
    assert fitted.validation[:, :-1] == pytest.approx(fitted.predict(validation.features))
    assert choose(train, validation, strengths, lambda outcomes: 0.0, classes=3).strength == 1e-3
