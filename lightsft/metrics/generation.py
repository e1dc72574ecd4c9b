"""Scores of generated text: what is counted per example, and the scores of any selection of examples from that.

Statistics are (examples, 35): BLEU's 10 and chrF's 18 (lightsft.metrics.translation), the F measures rouge1, rouge2,
rougeL and rougeLsum, exact match, token F1, and a 1, so that a sum of rows knows how many it is of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightsft.errors import DataError
from lightsft.metrics.answers import exact_match, token_f1
from lightsft.metrics.arrays import Array
from lightsft.metrics.rouge import NAMES, rouge
from lightsft.metrics.translation import BLEU_WIDTH, CHRF_WIDTH, bleu, bleu_statistics, chrf, chrf_statistics

MEANS = (*NAMES, "exact_match", "token_f1")
WIDTH = BLEU_WIDTH + CHRF_WIDTH + len(MEANS) + 1


def text_statistics(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    tokenizer: str = "13a",
    language: str = "en",
) -> Array:
    """(examples, 35) of texts and the reference, or several references, of each.

    tokenizer: sacrebleu's, for BLEU. language: "en" for the words of SQuAD and rouge_score, any other code for
    Unicode's, with characters for words in scripts without spaces. DataError for an example without a reference.
    """
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    _check(hypotheses, rows)
    means = [
        (*rouge(text, row, language), exact_match(text, row, language), token_f1(text, row, language), 1.0)
        for text, row in zip(hypotheses, rows, strict=True)
    ]
    return np.hstack(
        [
            bleu_statistics(hypotheses, rows, tokenizer),
            chrf_statistics(hypotheses, rows),
            np.array(means).reshape(len(rows), len(MEANS) + 1),
        ]
    )


def text_scores(statistics: Array) -> dict[str, float | None]:
    """BLEU and chrF of the corpus, from 0 to 100, and the means of the other scores, from 0 to 1.

    statistics: (examples, 35), or their sum (35,). All None without an example.
    """
    total = np.atleast_2d(statistics).astype(float).sum(axis=0)
    examples = total[-1]
    if not examples:
        return dict.fromkeys(("bleu", "chrf", *MEANS))
    means = (total[BLEU_WIDTH + CHRF_WIDTH : -1] / examples).tolist()
    return {
        "bleu": bleu(total[:BLEU_WIDTH]),
        "chrf": chrf(total[BLEU_WIDTH : BLEU_WIDTH + CHRF_WIDTH]),
        **dict(zip(MEANS, means, strict=True)),
    }


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references):
        raise DataError(
            f"{len(hypotheses)} texts and references of {len(references)}", expected="references for every text"
        )
    empty = [str(number) for number, row in enumerate(references, 1) if not row]
    if empty:
        raise DataError(f"no reference for the examples {', '.join(empty[:10])}", expected="at least one for each")
