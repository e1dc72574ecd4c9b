"""Scores of generated text equal sacrebleu's and rouge_score's, on a corpus and on any part of it."""

import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.answers import exact_match, token_f1
from lightsft.metrics.generation import WIDTH, text_scores, text_statistics
from lightsft.metrics.rouge import NAMES, lcs_length, rouge

WORDS = ["the", "cat", "Cat's", "sat", "on", "a", "mat,", "2.5%", "über", "(quickly)", "It", "was", "\n", "—", "end."]
CHINESE = [*"我爱北京天安门，今天天气很好。", "GPU ", "3.5"]


def texts(number, seed, words=WORDS, longest=25):
    """(hypotheses, references of each): random words, mostly taken over from the reference; some are empty."""
    chance = np.random.default_rng(seed)
    glue = " " if words is WORDS else ""
    hypotheses, references = [], []
    for _ in range(number):
        line = list(chance.choice(words, chance.integers(0, longest)))
        changed = [word if chance.random() < 0.7 else str(chance.choice(words)) for word in line]
        references.append(
            [glue.join(line), *(glue.join(chance.permutation(line)) for _ in range(chance.integers(0, 3)))]
        )
        hypotheses.append(glue.join(changed[: chance.integers(0, len(line) + 1)] if chance.random() < 0.4 else changed))
    return hypotheses, references


def streams(references):
    most = max(map(len, references))
    return [[row[k] if k < len(row) else None for row in references] for k in range(most)]


@pytest.mark.parametrize("number", [1, 2, 30])
@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_are_sacrebleu_s(seed, number):
    hypotheses, references = texts(number, seed)
    scores = text_scores(text_statistics(hypotheses, references))
    expected = sacrebleu.corpus_bleu(hypotheses, streams(references), force=True).score
    assert scores["bleu"] == pytest.approx(expected, abs=1e-9)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, streams(references)).score, abs=1e-9)


@pytest.mark.parametrize("tokenizer", ["zh", "char", "intl", "none"])
def test_bleu_follows_the_tokenizer(tokenizer):
    hypotheses, references = texts(20, 0, CHINESE if tokenizer == "zh" else WORDS)
    expected = sacrebleu.corpus_bleu(hypotheses, streams(references), tokenize=tokenizer, force=True).score
    scores = text_scores(text_statistics(hypotheses, references, tokenizer))
    assert scores["bleu"] == pytest.approx(expected, abs=1e-9)
    assert expected > 1


@pytest.mark.parametrize("longest", [3, 5, 9])
def test_orders_without_a_match_or_an_n_gram_are_smoothed_as_in_sacrebleu(longest):
    seen = set()
    for seed in range(60):
        hypotheses, references = texts(1, seed, longest=longest)
        expected = sacrebleu.corpus_bleu(hypotheses, streams(references), force=True)
        found = text_scores(text_statistics(hypotheses, references))
        assert found["bleu"] == pytest.approx(expected.score, abs=1e-9), (hypotheses, references)
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, streams(references)).score, abs=1e-9)
        seen.add(sum(count == 0 for count in expected.counts))
    assert len(seen) > 2


def test_a_resample_scores_as_its_texts_do():
    hypotheses, references = texts(25, 0)
    rows = np.random.default_rng(1).integers(0, 25, 25)
    statistics = text_statistics(hypotheses, references)
    assert statistics.shape == (25, WIDTH)
    chosen, wanted = [hypotheses[i] for i in rows], [references[i] for i in rows]
    scores = text_scores(statistics[rows])
    expected = sacrebleu.corpus_bleu(chosen, streams(wanted), force=True).score
    assert scores["bleu"] == pytest.approx(expected, abs=1e-9)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(chosen, streams(wanted)).score, abs=1e-9)
    assert scores["exact_match"] == np.mean([exact_match(a, b) for a, b in zip(chosen, wanted, strict=True)])
    assert scores["token_f1"] == pytest.approx(np.mean([token_f1(a, b) for a, b in zip(chosen, wanted, strict=True)]))
    assert text_scores(statistics[rows].sum(axis=0)) == scores
    assert text_scores(statistics[rows].astype(np.float32)) == pytest.approx(scores, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_rouge_is_rouge_score_s(seed):
    scorer = RougeScorer(list(NAMES))
    hypotheses, references = texts(25, seed)
    for hypothesis, wanted in zip(hypotheses, references, strict=True):
        expected = scorer.score_multi(wanted, hypothesis)
        found = rouge(hypothesis, wanted)
        assert found == pytest.approx([expected[name].fmeasure for name in NAMES], abs=1e-12), (hypothesis, wanted)


def test_the_means_of_rouge_are_those_of_the_examples():
    hypotheses, references = texts(20, 3)
    scores = text_scores(text_statistics(hypotheses, references))
    expected = np.mean([rouge(a, b) for a, b in zip(hypotheses, references, strict=True)], axis=0)
    assert [scores[name] for name in NAMES] == pytest.approx(expected)


def test_rouge_by_hand():
    one, two, longest, _ = rouge("the cat on the mat", ["the cat sat on a mat"])
    assert one == pytest.approx(2 * 4 / (5 + 6))
    assert two == pytest.approx(2 * 1 / (4 + 5))
    assert longest == pytest.approx(2 * 4 / (5 + 6))


def test_rouge_of_a_language_has_that_language_s_words():
    assert rouge("für Grün", ["für Blau"], "de")[0] == pytest.approx(1 / 2)
    assert rouge("für Grün", ["für Blau"])[0] == pytest.approx(2 * 2 / 7)  # f, r, gr, n and f, r, blau
    assert rouge("北京大学", ["北京"]) == (0, 0, 0, 0)
    assert rouge("北京大学", ["北京"], "zh")[:3] == pytest.approx((4 / 6, 2 / 4, 4 / 6))


def test_the_longest_common_subsequence_is_the_table_s():
    chance = np.random.default_rng(0)
    for _ in range(200):
        one, other = (list(chance.choice(list("abcd"), chance.integers(0, 90))) for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        for i, word in enumerate(one):
            for j, candidate in enumerate(other):
                both = table[i, j] + 1
                table[i + 1, j + 1] = both if word == candidate else max(table[i, j + 1], table[i + 1, j])
        assert lcs_length(one, other) == table[-1, -1]


@pytest.mark.parametrize(("hypothesis", "reference"), [("", "a cat"), ("a cat", ""), ("", ""), ("...", "...")])
def test_empty_texts_have_scores(hypothesis, reference):
    scores = text_scores(text_statistics([hypothesis], [reference]))
    assert scores["rougeL"] == 0
    assert scores["exact_match"] == (hypothesis == reference)
    assert scores["bleu"] == 0 == sacrebleu.corpus_bleu([hypothesis], [[reference]], force=True).score
    expected = sacrebleu.corpus_chrf([hypothesis], [[reference]]).score
    assert scores["chrf"] == pytest.approx(expected)


def test_no_examples_have_no_scores():
    statistics = text_statistics([], [])
    assert statistics.shape == (0, WIDTH)
    assert set(text_scores(statistics).values()) == {None}


def test_an_example_without_a_reference_is_named():
    with pytest.raises(DataError, match="examples 2"):
        text_statistics(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="2 texts and references of 1"):
        text_statistics(["a", "b"], ["a"])


def test_an_unknown_tokenizer_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="one of 13a, char"):
        text_statistics(["a"], ["a"], "14b")


def test_a_tokenizer_that_needs_a_package_says_so(monkeypatch):
    class NoMecab:
        TOKENIZERS = ("ja-mecab",)

        def __init__(self, **_):
            raise RuntimeError("Please install MeCab")

    monkeypatch.setattr(sacrebleu, "BLEU", NoMecab)
    with pytest.raises(ConfigurationError, match="install MeCab"):
        text_statistics(["a"], ["a"], "ja-mecab")


def test_without_sacrebleu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigurationError, match=r"lightsft\[generation\]"):
        text_statistics(["a"], ["a"])


def test_another_version_s_statistics_are_refused(monkeypatch):
    monkeypatch.setattr(sacrebleu.BLEU, "_extract_corpus_statistics", lambda *_: [[1, 2, 3]])
    with pytest.raises(ConfigurationError, match="counts 3 numbers"):
        text_statistics(["a"], ["a"])
