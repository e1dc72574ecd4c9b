"""The script of characters, from their Unicode names, and words written in two of them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

WORD = re.compile(r"[^\W\d_]+")
_CJK = frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "IDEOGRAPHIC"})
_LATIN_ALIKE = frozenset("ABCEHIJKMOPSTXYaceijopsxy")
_CYRILLIC_ALIKE = frozenset("АВСЕНІЈКМОРЅТХУасеіјорѕху")
_GREEK_ALIKE = frozenset("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧονι")


class Scripts(dict[int, str]):
    """Code point -> script ("Latin", "Cyrillic", "CJK", ...), looked up once; nothing for what belongs to none."""

    def __missing__(self, code: int) -> str:
        self[code] = script = _script(chr(code))
        return script


def _script(character: str) -> str:
    """The first word of a letter's name; signs that are letters in form alone (ª, µ, ℃, 𝐱) have none."""
    code = ord(character)
    if unicodedata.category(character) not in ("Lu", "Ll", "Lt", "Lo"):
        return ""
    if code in (0xAA, 0xB5, 0xBA) or 0x2100 <= code <= 0x214F or 0x1D400 <= code <= 0x1EEFF:
        return ""
    first = unicodedata.name(character, "").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").split(" ")[0]
    return "CJK" if first in _CJK else first.capitalize()


SCRIPTS = Scripts()


def script_counts(text: str) -> Counter[str]:
    """Letters of each script."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := SCRIPTS[ord(character)]:
            counts[script] += count
    return counts


def disguised_word(text: str) -> str:
    """The first word of Latin letters and such of another alphabet that look like them: "pаypal".

    One side consists of lookalikes entirely. Latin abbreviations with a Russian ending (SMSу) are spelling, and signs
    in front of a unit (Δt, μm) are no lookalikes.
    """
    for match in WORD.finditer(text):
        word = match.group()
        if not word.isascii() and _is_disguised(word):
            return word
    return ""


def _is_disguised(word: str) -> bool:
    letters: dict[str, str] = {}
    for character in word:
        script = SCRIPTS[ord(character)]
        letters[script] = letters.get(script, "") + character
    latin, cyrillic, greek = (letters.get(script, "") for script in ("Latin", "Cyrillic", "Greek"))
    if latin and cyrillic:
        ending = word.endswith(cyrillic) and len(latin) > 1 and latin.isupper() and cyrillic.islower()
        alike = _CYRILLIC_ALIKE.issuperset(cyrillic) or _LATIN_ALIKE.issuperset(latin)
        return alike and not ending
    return len(latin) >= 3 and bool(greek) and _GREEK_ALIKE.issuperset(greek)
