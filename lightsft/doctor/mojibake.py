"""UTF-8 that was read as cp1252 or Latin-1, found by undoing it: encoding such text again gives valid UTF-8.

An accent that was meant stands alone between letters and is no UTF-8: "é" is the first byte of three. Beside a
quotation mark or a no-break space it can be by chance ("LIBERTÉ»" is C9 BB, "ɻ"), so what comes out of the round trip
has to be what people write: Latin-1's own signs, punctuation, emoji; or at least three letters of one alphabet that
explain most of the row's characters beyond ASCII.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_CP1252 = {
    byte: bytes([byte]).decode("cp1252") for byte in range(128, 160) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_BYTES = {ord(character): byte for byte, character in _CP1252.items()}
_REST = "".join(map(re.escape, _CP1252.values())) + "\u0080-\u00bf"  # what the bytes 80 to BF may have become
_SEQUENCE = re.compile(f"[\u00c2-\u00df][{_REST}]|[\u00e0-\u00ef][{_REST}]{{2}}|[\u00f0-\u00f4][{_REST}]{{3}}")
_CLOSING = frozenset("»«“”„‘’‚‹›…–—™©®ºª°•·¸´¨¯ \u00a0!?")  # may follow a letter that was meant
FEWEST_LETTERS = 3


def mojibake(text: str) -> str:
    """The first damaged place and what it was, `Ã© for é`; nothing where there is none."""
    found = [(match, _undone(match.group())) for match in _SEQUENCE.finditer(text)]
    found = [(match, was) for match, was in found if was and not _was_meant(text, match)]
    for match, was in found:
        if _is_common(was):
            return f"{match.group()} for {was}"
    if len(found) >= FEWEST_LETTERS and _one_alphabet([was for _, was in found]):
        explained = sum(len(match.group()) for match, _ in found)
        if 2 * explained > sum(character > "\u007f" for character in text):
            match, was = found[0]
            return f"{match.group()} for {was}"
    return ""


def _undone(characters: str) -> str:
    """The character whose UTF-8 bytes these are; nothing if they are none."""
    try:
        return bytes(_BYTES.get(ord(c), ord(c)) for c in characters).decode("utf-8")
    except (UnicodeDecodeError, ValueError):
        return ""


def _is_common(character: str) -> bool:
    """Latin-1's own, dashes and quotation marks, the euro and trade-mark signs, the byte-order mark, emoji."""
    code = ord(character)
    return (
        0xA0 <= code <= 0xFF
        or 0x2010 <= code <= 0x2044
        or code in (0x20AC, 0x2122, 0xFEFF)
        or 0x1F300 <= code <= 0x1FAFF
    )


def _was_meant(text: str, match: re.Match[str]) -> bool:
    """A capital at the end of a word in capitals, and a sign that may follow: IRMÃ»."""
    first, rest = match.group()[0], match.group()[1:]
    before, after = text[: match.start()][-1:], text[match.end() :][:1]
    at_end = not after.isalnum() and all(character in _CLOSING for character in rest)
    return len(rest) == 1 and at_end and first.isalpha() and (before.isupper() or not before.isalnum())


def _one_alphabet(characters: list[str]) -> bool:
    """Whether most are letters of the same script, which the first word of their names tells."""
    written = [c for c in characters if c.isalpha() and not 0x180 <= ord(c) < 0x300]  # not the phonetic alphabet
    scripts = Counter(unicodedata.name(c, "?").split(" ")[0] for c in written)
    return bool(scripts) and 2 * max(scripts.values()) > len(characters) and max(scripts.values()) >= FEWEST_LETTERS
