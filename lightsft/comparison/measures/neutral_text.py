"""English prose that is there wherever Python is: the language reference that `help()` shows, without its markup.

Paragraphs of whole sentences, each once, in the order of the topics' names, joined to passages. What they say differs a
little between versions of Python; before and after a training it is the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lightsft.errors import ConfigurationError

PASSAGE = 2000  # characters, at least
SHORTEST = 150
EMPHASIS = re.compile(r"\*+(\w[^*]*)\*+")
LETTERS = 0.92  # letters, blanks and ordinary punctuation, of all characters


def neutral_passages() -> list[str]:
    """Passages of about PASSAGE characters."""
    passages, parts = [], list[str]()
    for paragraph in dict.fromkeys(_paragraphs()):
        parts.append(paragraph)
        if sum(map(len, parts)) >= PASSAGE:
            passages.append("\n\n".join(parts))
            parts = []
    return passages


def _paragraphs() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigurationError(
            "this Python was installed without pydoc_data, the language reference in its standard library",
            expected="a text to measure forgetting on",
            todo="name a file of texts of your own",
        ) from error
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            paragraph = " ".join(EMPHASIS.sub(r"\1", block.replace('"', "")).split())
            if not any(line[:1].isspace() for line in block.split("\n")) and _is_prose(paragraph):
                yield paragraph


def _is_prose(paragraph: str) -> bool:
    plain = sum(letter.isalpha() or letter in " .,;:'’" for letter in paragraph)
    return (
        len(paragraph) >= SHORTEST
        and paragraph[0].isupper()
        and paragraph.endswith(".")
        and "*" not in paragraph
        and plain >= LETTERS * len(paragraph)
    )
