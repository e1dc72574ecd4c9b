"""Tagged words as predictions: a text's words with their characters, and the entities that tags spell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightsft.metrics.entities import find_entities
from lightsft.metrics.words import UNSPACED

Place = tuple[int, int]  # first character, the one after the last
WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\w)+(?:['’.-](?:(?!{UNSPACED.pattern})\w)+)*|[^\w\s]")


def words_in(text: str) -> list[Place]:
    """Words, and marks beside them, as tagged data keeps them apart; characters in scripts without spaces."""
    return [match.span() for match in WORD.finditer(text)]


def places_of(words: Sequence[str]) -> list[Place]:
    """Where each word stands among all of them with spaces between."""
    places, position = [], 0
    for word in words:
        places.append((position, position + len(word)))
        position += len(word) + 1
    return places


def words_of(cell: Any) -> tuple[list[str], list[Place], str]:
    """The words of a text or a list, where they stand, and in which text."""
    if isinstance(cell, str):
        places = words_in(cell)
        return [cell[start:end] for start, end in places], places, cell
    words = [str(word) for word in cell]
    return words, places_of(words), " ".join(words)


def sentence(cell: Any, tagged: Mapping[str, tuple[str, float]], outside: str, scheme: str | None) -> dict[str, Any]:
    """{"words", "tags", "scores"} of a text or a list, and "entities" if there is a scheme.

    tagged: the tag and its probability by the number of the word; a word that is not there is outside.
    """
    words, places, text = words_of(cell)
    pairs = [tagged.get(str(number), (outside, 0.0)) for number in range(len(words))]
    tags, scores = [tag for tag, _ in pairs], [score for _, score in pairs]
    found = {"words": words, "tags": tags, "scores": scores}
    return found if scheme is None else {**found, "entities": entities(tags, scores, places, text, scheme)}


def entities(
    tags: Sequence[str], scores: Sequence[float], places: Sequence[Place], text: str, scheme: str
) -> list[dict[str, Any]]:
    """{"type", "text", "start", "end", "score"}: its characters, and the mean probability of its words' tags."""
    found = []
    for name, first, last in find_entities(tags, scheme):
        start, end = places[first][0], places[last - 1][1]
        score = sum(scores[first:last]) / (last - first)
        found.append({"type": name, "text": text[start:end], "start": start, "end": end, "score": score})
    return found
