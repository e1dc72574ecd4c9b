"""A text with other words in the places of its words."""

from __future__ import annotations

import re
from collections.abc import Callable

Respelling = Callable[[list[str]], list[str]]  # words to as many words; there may be empty ones among them


def words_changed(text: str, change: Respelling) -> str:
    """The text with its words changed and the blanks between them as they were."""
    parts = re.split(r"(\s+)", text)  # words stand at even places, blanks between them
    parts[::2] = change(parts[::2])
    return "".join(parts)
