"""Long texts in several windows, with the place of each word or character in them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

from lightsft.errors import ConfigurationError, DataError

Places = list[int | None]
Span = tuple[int, int, int]  # first character, the one after the last, number of the word
MARK = "*"


def windows_of_words(
    words: Sequence[str], tokenizer: Any, max_length: int, marked: int | None = None
) -> Iterator[tuple[dict[str, list[int]], Places]]:
    """(token features, the word that each token is the first of, or None) of windows over a sentence.

    The words are joined by spaces and found again by the tokens' offsets, so any fast tokenizer serves. No word begins
    in two windows, and a blank one in none. The word with the number `marked` is put in front of every window, as a
    text of its own, and stands between marks in the sentence: it may occur there more than once.
    """
    sentence, spans = _joined(words, marked)
    texts = [sentence] if marked is None else [words[marked], sentence]
    if room_beside(words[marked] if marked is not None else None, tokenizer, max_length) < 1:
        raise DataError(
            f"max_length={max_length} leaves no room for a token" + ("" if marked is None else f" beside {texts[0]!r}"),
            expected="windows of a few tokens at least",
            todo="raise --max-length",
        )
    encoded = tokenizer(
        *texts,
        truncation="only_first" if marked is None else "only_second",
        max_length=min(max_length, tokenizer.model_max_length),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    seen: set[int] = set()
    for number in range(len(encoded["input_ids"])):
        offsets, sequences = encoded["offset_mapping"][number], encoded.sequence_ids(number)
        places: Places = []
        for (start, end), sequence in zip(offsets, sequences, strict=True):
            word = _word_at(spans, start, end) if sequence == len(texts) - 1 else None
            places.append(None if word in seen else word)
            seen |= set() if word is None else {word}
        names = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
        yield {name: encoded[name][number] for name in names}, places


def room_beside(first: str | None, tokenizer: Any, max_length: int) -> int:
    """Tokens that a window leaves for a text, after `first` and the special tokens; below 1 where there is none."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand",
            expected="a fast tokenizer (tokenizer.json)",
            todo="take a checkpoint that has one",
        )
    own = 0 if first is None else len(tokenizer(first, add_special_tokens=False, verbose=False)["input_ids"])
    special: int = tokenizer.num_special_tokens_to_add(pair=first is not None)
    return min(max_length, int(tokenizer.model_max_length)) - own - special


def _joined(words: Sequence[str], marked: int | None) -> tuple[str, list[Span]]:
    """The sentence, and where each word stands in it."""
    text, spans = "", []
    for number, word in enumerate(words):
        if not word.strip():
            continue
        text += (" " if text else "") + (f"{MARK} " if number == marked else "")
        spans.append((len(text), len(text) + len(word.strip()), number))
        text += word.strip() + (f" {MARK}" if number == marked else "")
    return text, spans


def _word_at(spans: Sequence[Span], start: int, end: int) -> int | None:
    """The last word that characters [start, end) are part of; a token may carry the space before its word."""
    if end <= start:
        return None
    last = bisect_left(spans, end, key=itemgetter(0)) - 1
    return spans[last][2] if last >= 0 and start < spans[last][1] else None
