"""BLEU and chrF of a corpus from sums of counts per example; sacrebleu counts, so the figures are its figures.

    BLEU = 100 exp(min(0, 1 - r / c)) (prod_n p_n)^(1/4), n = 1..4       (Papineni et al., 2002; 1804.08771)
    chrF = 100 (1 + 4) P R / (4 P + R), P and R means over n = 1..6      (Popović, 2015)

c and r are the lengths of hypotheses and closest references in tokens; p_n = matches / n-grams; P and R are precision
and recall of character n-grams, over the orders that occur on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightsft.errors import ConfigurationError, first_line
from lightsft.metrics.arrays import Array

BLEU_ORDER, CHRF_ORDER, BETA = 4, 6, 2
BLEU_WIDTH, CHRF_WIDTH = 2 + 2 * BLEU_ORDER, 3 * CHRF_ORDER


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a") -> Array:
    """(examples, 10): tokens of the hypothesis and of the closest reference, 4 counts of matches, 4 of n-grams.

    references: those of each example, at least one. tokenizer: one of sacrebleu's ("13a", "intl", "zh", "char", ...).
    """
    sacrebleu = _sacrebleu()
    known = sorted(sacrebleu.BLEU.TOKENIZERS)
    if tokenizer not in known:
        raise ConfigurationError(f"the BLEU tokenizer {tokenizer!r}", expected=f"one of {', '.join(known)}")
    try:
        metric = sacrebleu.BLEU(tokenize=tokenizer, force=True)
    except (ImportError, RuntimeError) as error:  # a package that only this tokenizer needs
        raise ConfigurationError(f"the BLEU tokenizer {tokenizer!r} cannot be used: {first_line(error)}") from error
    return _statistics(metric, hypotheses, references, BLEU_WIDTH)


def chrf_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """(examples, 18): for 1 to 6 characters the n-grams of the hypothesis, of the best reference, and matches."""
    metric = _sacrebleu().CHRF(char_order=CHRF_ORDER, word_order=0, beta=BETA)
    return _statistics(metric, hypotheses, references, CHRF_WIDTH)


def bleu(total: Array) -> float:
    """BLEU, 0 to 100, of summed statistics (10,).

    An order without a match counts as half a match, the next one as a quarter, and so on (sacrebleu's smoothing
    "exp"); without an n-gram of every order, or without any match, BLEU is 0.
    """
    found, wanted = total[:2]
    matches, ngrams = total[2 : 2 + BLEU_ORDER], total[2 + BLEU_ORDER :]
    if not matches.any() or not ngrams.all():
        return 0.0
    zeros = matches == 0
    precision = np.where(zeros, 0.5 ** np.cumsum(zeros), matches) / ngrams
    brevity = min(0.0, 1 - wanted / found)
    return 100 * math.exp(brevity + float(np.log(precision).mean()))


def chrf(total: Array) -> float:
    """chrF2, 0 to 100, of summed statistics (18,); 0 where nothing matches."""
    found, wanted, matches = total.reshape(CHRF_ORDER, 3).T
    both = (found > 0) & (wanted > 0)
    if not matches[both].any():
        return 0.0
    precision, recall = ((matches[both] / count[both]).mean() for count in (found, wanted))
    return float(100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall))


def _statistics(metric: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]], width: int) -> Array:
    if not hypotheses:
        return np.zeros((0, width))
    most = max(map(len, references))
    streams = [[row[number] if number < len(row) else None for row in references] for number in range(most)]
    found = np.array(metric._extract_corpus_statistics(hypotheses, streams), dtype=float)
    if found.shape != (len(hypotheses), width):
        raise ConfigurationError(
            f"sacrebleu counts {found.shape[-1]} numbers per example",
            expected=f"{width}, as its version 2.6 does",
            todo="pip install sacrebleu==2.6.0",
        )
    return found


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise ConfigurationError(
            "sacrebleu is not installed",
            expected="the package that counts for BLEU and chrF",
            todo="pip install 'lightsft[generation]'",
        ) from None
    return sacrebleu
