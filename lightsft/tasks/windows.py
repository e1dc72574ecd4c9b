"""Long texts in several windows, with the place of each word or character in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Places = list[int | None]


def windows_of_words(
    words: Sequence[str], tokenizer: Any, max_length: int, front: str | None = None
) -> Iterator[tuple[dict[str, list[int]], Places]]:
    """(token features, the word that each token is the first of, or None) of windows over a sentence.

    The words are joined by spaces and found again by the tokens' offsets, so any fast tokenizer serves. No word begins
    in two windows. `front` is a text before the sentence, in every window.
    """
    starts = _starts(words)
    texts = [" ".join(words)] if front is None else [front, " ".join(words)]
    encoded = tokenizer(
        *texts,
        truncation="only_first" if front is None else "only_second",
        max_length=min(max_length, tokenizer.model_max_length),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    seen: set[int] = set()
    for number in range(len(encoded["input_ids"])):
        offsets, sequences = encoded["offset_mapping"][number], encoded.sequence_ids(number)
        places: Places = []
        for (start, end), sequence in zip(offsets, sequences, strict=True):
            word = _word_at(starts, words, start, end) if sequence == len(texts) - 1 else None
            places.append(None if word in seen else word)
            seen |= set() if word is None else {word}
        names = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
        yield {name: encoded[name][number] for name in names}, places


def _starts(words: Sequence[str]) -> list[int]:
    """Where each word begins in the joined text."""
    starts, position = [], 0
    for word in words:
        starts.append(position)
        position += len(word) + 1
    return starts


def _word_at(starts: Sequence[int], words: Sequence[str], start: int, end: int) -> int | None:
    """The first word that characters [start, end) are part of; a token may carry the space before its word."""
    from bisect import bisect_left

    if end <= start:
        return None
    word = bisect_left(starts, end) - 1
    return word if word >= 0 and start < starts[word] + len(words[word]) else None
