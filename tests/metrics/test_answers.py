"""Exact match, F1 and the threshold for no answer, as SQuAD's and MLQA's evaluations define them."""

import collections
import re
import string

import numpy as np
import pytest

from lightsft.metrics.answers import answer_outcome, answer_scores, best_threshold, exact_match, normalise, token_f1
from lightsft.metrics.words import is_unspaced, words_of


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The  Cat's\tpaws!", "en", "cats paws"),
        ("a Theory an the", "en", "theory"),
        ("1939–1945", "en", "1939–1945"),  # SQuAD drops ASCII's punctuation alone
        ("1939–1945", "fr", "19391945"),
        ("Der Hund; die Katze.", "de", "hund katze"),
        ("the the", "fr", "the the"),
        ("El Niño", "es", "niño"),
        ("في القاهرة", "ar", "في قاهرة"),
        ("北京大学（PKU）。", "zh", "北 京 大 学 pku"),
        ("2008年北京", "zh", "2008 年 北 京"),
        ("東京タワー", "ja", "東 京 タ ワ ー"),
        ("北京大学", "en", "北京大学"),
        ("", "en", ""),
    ],
)
def test_what_does_not_count_is_removed(text, language, expected):
    assert normalise(text, language) == expected


def test_an_article_inside_a_word_stays():
    assert normalise("another theme, Anna") == "another theme anna"


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The Eiffel Tower", ["Eiffel Tower"], 1, 1),
        ("tower", ["Eiffel Tower"], 0, 2 / 3),
        ("in the Eiffel Tower", ["Paris", "Eiffel Tower."], 0, 0.8),
        ("a a b", ["a b b"], 0, 1 / 1.5),
        ("dog dog cat", ["dog cat cat"], 0, 2 / 3),
        ("x", ["y"], 0, 0),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("the", [], 1, 1),
        ("", ["gold"], 0, 0),
        ("", ["the"], 1, 1),  # a gold answer without a word is none
        ("gold", ["the", "gold"], 1, 1),
    ],
)
def test_known_answers(prediction, golds, exact, f1):
    assert exact_match(prediction, golds) == exact
    assert token_f1(prediction, golds) == pytest.approx(f1)


def test_characters_are_compared_where_there_are_no_spaces():
    assert token_f1("北京大学", ["北京"], "zh") == pytest.approx(2 * 2 / 6)
    assert token_f1("北京大学", ["北京"], "en") == 0
    assert exact_match("北京。", ["北京"], "zh") == 1


def squad_tokens(text):
    """The published rules one after the other, to compare with."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(prediction, gold):
    found, wanted = squad_tokens(prediction), squad_tokens(gold)
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_random_answers_score_as_squad_s_rules_say():
    chance = np.random.default_rng(0)
    pieces = ["the", "A", "cat", "dog,", "(1999)", "–", "U.S.", "'", "x-y"]
    for _ in range(500):
        texts = [" ".join(chance.choice(pieces, chance.integers(0, 6))) for _ in range(3)]
        golds = [text for text in texts[1:] if squad_tokens(text)] or [""]
        assert token_f1(texts[0], texts[1:]) == pytest.approx(max(squad_f1(texts[0], gold) for gold in golds)), texts
        same = any(squad_tokens(texts[0]) == squad_tokens(gold) for gold in golds)
        assert exact_match(texts[0], texts[1:]) == float(same)


def test_questions_with_and_without_an_answer_are_told_apart():
    outcomes = np.array(
        [
            answer_outcome("Paris", ["Paris"]),
            answer_outcome("in Paris", ["Paris"]),
            answer_outcome("", ["Rome"]),
            answer_outcome("", []),
            answer_outcome("Berlin", []),
        ]
    )
    assert answer_scores(outcomes) == pytest.approx(
        {
            "exact_match": 2 / 5,
            "f1": (1 + 2 / 3 + 1) / 5,
            "has_answer_exact_match": 1 / 3,
            "has_answer_f1": (1 + 2 / 3) / 3,
            "no_answer_accuracy": 1 / 2,
        }
    )
    assert answer_scores(outcomes[:3])["no_answer_accuracy"] is None


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better(seed):
    chance = np.random.default_rng(seed)
    examples = int(chance.integers(1, 30))
    null = chance.integers(-5, 5, examples).astype(float)  # many are equal
    has = chance.integers(0, 2, examples)
    answered = np.where(has, chance.random(examples), chance.integers(0, 2, examples))
    threshold, score = best_threshold(null, answered, has)

    def at(t):
        return np.where(null <= t, answered, 1 - has).mean()

    assert score == pytest.approx(at(threshold))
    assert score == pytest.approx(max(at(t) for t in [-99, *null]))


def test_silence_and_talk_are_thresholds_too():
    null = np.array([0.2, 0.8])
    threshold, score = best_threshold(null, np.zeros(2), np.zeros(2))
    assert (threshold < 0.2, score) == (True, 1.0)
    assert best_threshold(null, np.ones(2), np.ones(2)) == (0.8, 1.0)
    with pytest.raises(ValueError, match="no null scores"):
        best_threshold(np.array([]), np.array([]), np.array([]))


def test_words_of_any_script():
    assert words_of("Grüße, ﻿World_2!") == ["grüße", "world", "2"]
    assert words_of("हिन्दी में") == ["हिन्दी", "में"]
    assert words_of("我爱NLP") == ["我", "爱", "nlp"]
    assert words_of("...") == []


def test_scripts_without_spaces_are_recognised():
    assert is_unspaced(["北京 ok"]) is False  # half of the letters
    assert is_unspaced(["北京大学 ok"]) is True
    assert is_unspaced(["ภาษาไทย"]) is True
    assert is_unspaced(["한국어", "Русский", "हिन्दी", "English"]) is False
    assert is_unspaced([]) is False
