"""Loss, perplexity and accuracy per token."""

import numpy as np
import pytest

from lightsft.metrics.language import perplexity, token_scores


def test_tokens_weigh_the_same_whatever_their_example():
    chance = np.random.default_rng(0)
    examples = [(chance.random(n), chance.random(n) < 0.5) for n in (1, 9, 30)]
    outcomes = np.array([[nll.sum(), right.sum(), len(nll)] for nll, right in examples])
    likelihood = np.concatenate([nll for nll, _ in examples])
    right = np.concatenate([right for _, right in examples])
    found = token_scores(outcomes)
    assert found["loss"] == pytest.approx(likelihood.mean())
    assert found["perplexity"] == pytest.approx(np.prod(np.exp(likelihood)) ** (1 / 40))
    assert found["token_accuracy"] == pytest.approx(right.mean())


def test_guessing_among_a_vocabulary_has_its_size_as_perplexity():
    assert token_scores(np.array([[10 * np.log(500), 0, 10]]))["perplexity"] == pytest.approx(500)


def test_without_a_token_there_is_no_score():
    assert set(token_scores(np.zeros((2, 3))).values()) == {None}


def test_a_perplexity_beyond_floating_point_is_none():
    assert perplexity(710.0) is None
    assert perplexity(float("inf")) is None
    assert perplexity(float("nan")) is None
    assert perplexity(0.0) == 1
