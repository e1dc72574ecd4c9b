"""TF-IDF of words and characters with a linear model: what a text's words say without any pretraining.

    tf-idf(t, d) = (1 + ln count(t, d)) (ln((1 + n) / (1 + df(t))) + 1), each text's vector divided by its length

over the n training texts, of 1- and 2-grams of words, and of 2- to 5-grams of characters within words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightsft.comparison.baselines.baseline import Baseline, score_of
from lightsft.comparison.baselines.fitting import Given, choose
from lightsft.data.splits import Splits, at_most
from lightsft.tasks.base import Task

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C
MOST_ROWS = 20_000
MOST_WEIGHTS = 2_000_000  # of each kind of n-grams, over all classes: the solver keeps twenty copies of them
MOST_NGRAMS = 100_000
READ_CHARACTERS = 1000  # of each text, for the n-grams of characters
FEW_ROWS = 200  # in fewer, an n-gram of a single text counts too


def tfidf(task: Task, splits: Splits, metric: str, *, most_rows: int = MOST_ROWS) -> Baseline | None:
    """None for tasks that read something else than texts, or say something else than labels or numbers."""
    began = time.perf_counter()
    train = at_most(splits.train, most_rows, task.key)
    truth = [task.truth(rows) for rows in (train, splits.validation, splits.test)] if task.reads_text else [None]
    if any(one is None for one in truth):
        return None
    classes = len(getattr(task, "labels", ()))
    texts = [[task.text_of(row) for row in rows] for rows in (train, splits.validation, splits.test)]
    features = _features(texts, max(1, min(MOST_NGRAMS, MOST_WEIGHTS // max(1, classes))))
    if features is None:
        return None
    given = [Given(one, other) for one, other in zip(features, truth, strict=True) if other is not None]
    fitted = choose(given[0], given[1], STRENGTHS, score_of(task, metric), classes=classes, weights=task.label_weights)
    test = np.column_stack([fitted.predict(given[2].features), given[2].truth])
    about = (
        f"TF-IDF of words (1-2) and characters (2-5) with {'logistic' if classes > 1 else 'ridge'} regression, "
        f"C = {fitted.strength:g}, fitted on {len(train)} of {len(splits.train)} training rows"
    )
    return Baseline(fitted.validation, test, about, time.perf_counter() - began)


def _features(texts: Sequence[Sequence[str]], most: int) -> list[Any] | None:
    """Sparse (texts, n-grams) of each split, fitted on the first; None where no n-gram occurs often enough."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    shared = {"sublinear_tf": True, "min_df": 1 if len(texts[0]) < FEW_ROWS else 2, "max_features": most}
    vectorizers = [
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **shared),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), preprocessor=_beginning, **shared),
    ]
    kinds = []
    for vectorizer in vectorizers:
        try:
            first = vectorizer.fit_transform(texts[0])
        except ValueError:  # an empty vocabulary: texts of punctuation have no words
            continue
        kinds.append([first, *(vectorizer.transform(part) for part in texts[1:])])
    return [hstack(parts, format="csr") for parts in zip(*kinds, strict=True)] if kinds else None


def _beginning(text: str) -> str:
    return text[:READ_CHARACTERS].lower()
