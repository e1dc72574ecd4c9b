"""Words of a text in any script: where a script puts no spaces between words, each of its characters is one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Han with its marks, Hiragana and Katakana, Thai and Lao, Burmese, Khmer.
UNSPACED = re.compile(
    "[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)


def is_unspaced(texts: Iterable[str]) -> bool:
    """Whether most letters of some texts belong to scripts without spaces between words."""
    letters = unspaced = 0
    for text in texts:
        letters += sum(character.isalpha() or is_mark(character) for character in text)
        unspaced += len(UNSPACED.findall(text))
    return 2 * unspaced > letters


def split_unspaced(text: str) -> str:
    """The text with spaces around every character of a script without spaces (MLQA's mixed segmentation)."""
    return UNSPACED.sub(r" \g<0> ", text)


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and the marks on them, in lower case; characters where there are no spaces."""
    kept = "".join(character if _in_word(character) else " " for character in text.lower())
    return split_unspaced(kept).split()


@lru_cache(maxsize=4096)
def is_punctuation(character: str) -> bool:
    """Whether Unicode calls it punctuation (P*)."""
    return unicodedata.category(character)[0] == "P"


@lru_cache(maxsize=4096)
def is_mark(character: str) -> bool:
    """Whether it stands on or beside a letter (M*), as vowels do in Devanagari or Thai."""
    return unicodedata.category(character)[0] == "M"


@lru_cache(maxsize=4096)
def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"
