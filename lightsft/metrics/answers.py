"""Answers to questions: SQuAD's exact match and F1, its second version's breakdown, and the threshold for no answer.

English is scored by the rules of SQuAD's evaluation (1606.05250, 1806.03822), other languages by MLQA's (1910.07475):
all of Unicode's punctuation instead of ASCII's, that language's articles, characters for words in scripts without
spaces. Scores are shares, from 0 to 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from lightsft.metrics.arrays import Array
from lightsft.metrics.words import is_punctuation, split_unspaced

ASCII_PUNCTUATION = frozenset(string.punctuation)
# As MLQA's evaluation drops them; a language that is not here keeps every word.
ARTICLES = {
    "en": "a|an|the",
    "de": "ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des",
    "es": "un|una|unos|unas|el|la|los|las",
    "vi": "của|là|cái|chiếc|những",
}


def normalise(text: str, language: str = "en") -> str:
    """The text in lower case, without punctuation and articles, with single spaces.

    language: "en" for SQuAD's rules; any other code for MLQA's, which split scripts without spaces into characters.
    Arabic loses the article "ال" at the start of words (MLQA's expression removes these letters inside words too).
    """
    english = language == "en"
    kept = "".join(c for c in text.lower() if c not in ASCII_PUNCTUATION and (english or not is_punctuation(c)))
    if language in ARTICLES:
        kept = re.sub(rf"\b({ARTICLES[language]})\b", " ", kept)
    if language == "ar":
        kept = re.sub(r"\sال|^ال", " ", kept)
    return " ".join((kept if english else split_unspaced(kept)).split())


def exact_match(prediction: str, golds: Sequence[str], language: str = "en") -> float:
    """1 if the normalised prediction equals a normalised gold answer, else 0."""
    return _best(lambda found, gold: float(found == gold), prediction, golds, language)


def token_f1(prediction: str, golds: Sequence[str], language: str = "en") -> float:
    """2 |p & g| / (|p| + |g|) over multisets of words, of the gold answer where it is highest.

    Where either side has no words it is 1 if neither has, else 0.
    """
    return _best(_overlap, prediction, golds, language)


def answer_outcome(prediction: str, golds: Sequence[str], language: str = "en") -> Array:
    """(3,): exact match, F1, and whether the question has an answer.

    Without gold answers, or with none that leaves a word, the empty prediction is right and any other wrong.
    """
    answered = any(normalise(gold, language) for gold in golds)
    scores = (score(prediction, golds, language) for score in (exact_match, token_f1))
    return np.array([*scores, float(answered)])


def answer_scores(outcomes: Array) -> dict[str, float | None]:
    """Exact match and F1 of all questions, of those with an answer, and the accuracy on those without.

    outcomes: (examples, 3) of `answer_outcome`. On questions without an answer exact match and F1 are the same; None
    for a part without questions.
    """
    exact, f1, answered = outcomes.astype(float).T
    has = answered > 0.5
    return {
        "exact_match": _mean(exact),
        "f1": _mean(f1),
        "has_answer_exact_match": _mean(exact[has]),
        "has_answer_f1": _mean(f1[has]),
        "no_answer_accuracy": _mean(exact[~has]),
    }


def best_threshold(null_scores: Array, answered: Array, has_answer: Array) -> tuple[float, float]:
    """(t, mean score) for the t at which giving an answer where null_score <= t, and none elsewhere, scores best.

    null_scores: (examples,), higher where no answer is likelier. answered: (examples,) the score (exact match or F1)
    of each prediction if it is given. has_answer: (examples,) of 0 and 1; silence scores 1 where there is none. Equal
    null scores are answered together. Among equals the lowest t; below every null score when silence is best.
    """
    if not len(null_scores):
        raise ValueError("no null scores to choose a threshold from")
    silent = 1.0 - np.asarray(has_answer, dtype=float)
    order = np.argsort(null_scores, kind="stable")
    thresholds = np.asarray(null_scores, dtype=float)[order]
    gains = np.cumsum((np.asarray(answered, dtype=float) - silent)[order])
    last = np.append(thresholds[1:] != thresholds[:-1], True)
    candidates = np.append(np.nextafter(thresholds[0], -np.inf), thresholds[last])
    totals = silent.sum() + np.append(0.0, gains[last])
    best = int(totals.argmax())
    return float(candidates[best]), float(totals[best] / len(silent))


def _best(score: Callable[[str, str], float], prediction: str, golds: Sequence[str], language: str) -> float:
    """The highest score over gold answers that leave a word, or over the empty one."""
    texts = [text for text in (normalise(gold, language) for gold in golds) if text] or [""]
    found = normalise(prediction, language)
    return max(score(found, text) for text in texts)


def _overlap(found: str, gold: str) -> float:
    one, other = Counter(found.split()), Counter(gold.split())
    if not one or not other:
        return float(one == other)
    return 2 * (one & other).total() / (one.total() + other.total())


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None
