"""ROUGE (Lin, 2004): F measures of shared n-grams and of the longest common subsequence, from 0 to 1.

In English words are runs of a-z and 0-9 in lower case and are not stemmed: the figures of the rouge_score package.
Elsewhere they are those of `words_of`, since [a-z0-9]+ finds none in most languages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from lightsft.metrics.words import words_of

Words = Sequence[str]
ENGLISH = re.compile("[a-z0-9]+")
NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(hypothesis: str, references: Sequence[str], language: str = "en") -> tuple[float, float, float, float]:
    """F measures of rouge1, rouge2, rougeL and rougeLsum, each of the reference where it is highest."""
    words = _words_in(language)
    found, lines = words(hypothesis), _lines(hypothesis, words)
    scores = []
    for reference in references:
        wanted = words(reference)
        scores.append(
            (
                ngram_f(found, wanted, 1),
                ngram_f(found, wanted, 2),
                f_measure(lcs_length(found, wanted), len(found), len(wanted)),
                summary_f(lines, _lines(reference, words)),
            )
        )
    one, two, longest, summary = (max(column) for column in zip(*scores, strict=True))
    return one, two, longest, summary


def f_measure(shared: int, found: int, wanted: int) -> float:
    """2 P R / (P + R) = 2 shared / (found + wanted), P = shared / found and R = shared / wanted; 0 when none is."""
    return 2 * shared / (found + wanted) if shared else 0.0


def ngram_f(found: Words, wanted: Words, order: int) -> float:
    """F measure of the n-grams of two word sequences, each counted as often as it is in both."""
    one, other = _ngrams(found, order), _ngrams(wanted, order)
    return f_measure((one & other).total(), one.total(), other.total())


def lcs_length(one: Words, other: Words) -> int:
    """Length of the longest common subsequence, a word of `other` at a time with a bit per word of `one`.

    A zero at bit i says that the subsequence grows at word i (Hyyrö, 2004).
    """
    places: dict[str, int] = {}
    for position, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << position
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & every
    return len(one) - row.bit_count()


def summary_f(found: Sequence[Words], wanted: Sequence[Words]) -> float:
    """Summary-level LCS (section 3.2): per line of the reference, the union of its LCS with each line found.

    found, wanted: words by line. A word counts at most as often as it is on either side, as in ROUGE-1.5.5.
    """
    left_found = Counter(word for line in found for word in line)
    left_wanted = Counter(word for line in wanted for word in line)
    sizes = left_found.total(), left_wanted.total()
    shared = 0
    for line in wanted:
        for position in sorted(set().union(*(_lcs_positions(line, other) for other in found))):
            word = line[position]
            if left_found[word] > 0 and left_wanted[word] > 0:
                left_found[word] -= 1
                left_wanted[word] -= 1
                shared += 1
    return f_measure(shared, *sizes)


def _words_in(language: str) -> Callable[[str], list[str]]:
    return (lambda text: ENGLISH.findall(text.lower())) if language == "en" else words_of


def _lines(text: str, words: Callable[[str], list[str]]) -> list[list[str]]:
    return [words(line) for line in text.split("\n") if line]


def _ngrams(words: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _lcs_positions(one: Words, other: Words) -> set[int]:
    """Positions in `one` of a longest common subsequence: the one that rouge_score finds among several."""
    table = _lcs_table(one, other)
    found, i, j = set(), len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found


def _lcs_table(one: Words, other: Words) -> list[list[int]]:
    """(len(one) + 1, len(other) + 1) lengths of the LCS of the first words of each."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for j, candidate in enumerate(other):
            row.append(above[j] + 1 if word == candidate else max(above[j + 1], row[j]))
        table.append(row)
    return table
