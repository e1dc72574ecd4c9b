"""Scores of the same test rows spelled in other ways: with typing errors, in lower case, in upper case.

Typing errors: 10 % of a text's words of more than three letters, on average, each with one letter swapped with the
next, left out, doubled, or replaced by one beside it on the keyboard (QWERTY; letters that are not on it are doubled).
They are drawn from the text and the seed, so every strategy reads the same errors.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from lightsft.data.reading import Row
from lightsft.tasks.base import Metrics, Task

SHARE = 0.1
SHORTEST = 4  # letters
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def robustness(
    task: Task, rows: Sequence[Row], score_rows: Callable[[list[Row]], Metrics], *, seed: int = 0
) -> dict[str, Metrics] | None:
    """The metrics of the rows spelled in each way; None for a task that reads no text that may be respelled."""
    found = {}
    for kind, changed in respelled_rows(task, rows, seed).items():
        found[kind] = score_rows(changed)
    return found or None


def respelled_rows(task: Task, rows: Sequence[Row], seed: int = 0) -> dict[str, list[Row]]:
    """The rows spelled in each way, their targets as they were; nothing where the task reads no such text."""
    ways: dict[str, Callable[[list[str]], list[str]]] = {
        "typos": lambda words: with_typos(words, seed),
        "lowercase": lambda words: [word.lower() for word in words],
        "uppercase": lambda words: [word.upper() for word in words],
    }
    changed = {kind: [task.respelled(row, change) for row in rows] for kind, change in ways.items()}
    return {kind: [row for row in made if row is not None] for kind, made in changed.items() if None not in made}


def with_typos(words: Sequence[str], seed: int = 0) -> list[str]:
    """As many words, some of them misspelled; the same ones whenever it is asked for these words and this seed."""
    chance = random.Random(hashlib.sha256(f"{seed}\n{' '.join(words)}".encode(errors="surrogatepass")).digest())
    long = [place for place, word in enumerate(words) if sum(map(str.isalpha, word)) >= SHORTEST]
    number = int(SHARE * len(long) + chance.random())  # its expectation is the share, in short texts too
    chosen = set(chance.sample(long, number))
    return [misspelled(word, chance) if place in chosen else word for place, word in enumerate(words)]


def misspelled(word: str, chance: random.Random) -> str:
    """The word with one letter wrong: not the first, since few people mistype that."""
    place = chance.choice([place for place, letter in enumerate(word) if letter.isalpha()][1:])
    before, letter, after = word[:place], word[place], word[place + 1 :]
    ways: list[Callable[[], Any]] = [
        lambda: before + after[:1] + letter + after[1:],  # swapped with the next
        lambda: before + after,
        lambda: before + letter + letter + after,
        lambda: before + _beside(letter, chance) + after,
    ]
    made: str = chance.choice(ways)()
    return made if made != word else before + letter + letter + after


def _beside(letter: str, chance: random.Random) -> str:
    """A key beside the letter's, in the letter's case; twice the letter where the keyboard has no such key."""
    row = next((keys for keys in KEYS if letter.lower() in keys), None)
    if row is None:
        return letter + letter
    place = row.index(letter.lower())
    near = chance.choice(row[max(0, place - 1) : place] + row[place + 1 : place + 2])
    return near.upper() if letter.isupper() else near
