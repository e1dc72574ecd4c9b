"""Characters that say a text was damaged on its way: replaced, misread, invisible, or left over from a page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from lightsft.data.problems import Severity
from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import NOTHING, Finding, plural
from lightsft.doctor.mojibake import mojibake
from lightsft.doctor.samples import excerpt

_CONTROL_BYTES = bytes(b for b in range(32) if b not in b"\t\n\r") + b"\x7f"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Zero-width space, word joiner, byte-order mark, soft hyphen, directions. A joiner between letters is spelling
# (Persian, Hindi) and between pictures an emoji: both stay.
INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile("[\ud800-\udfff]")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,31}\d{0,2});")
TAG = re.compile(
    r"</?(?:a|abbr|b|blockquote|body|br|button|center|code|dd|div|dl|dt|em|font|footer|form|h[1-6]|head|header|hr|html|i"
    r"|iframe|img|input|li|link|meta|nav|ol|option|p|pre|script|section|select|small|span|strong|style|sub|sup|table|tbody"
    r"|td|textarea|th|thead|title|tr|tt|u|ul|video)(?:\s[^<>]{0,500})?/?>",
    re.IGNORECASE,
)

KINDS: dict[str, tuple[Severity, str, str, str]] = {
    "surrogate": (
        "error", "half of a surrogate pair, which is no character", "stops: a tokenizer refuses it",
        "repair what wrote the file: an escape like \\ud83d was cut off from its second half",
    ),
    "replacement_character": (
        "warning", "U+FFFD, where a character was lost", NOTHING,
        "read the source again in its own encoding; what was replaced cannot be told from the text",
    ),
    "mojibake": (
        "warning", "UTF-8 that was read as cp1252 or Latin-1", NOTHING,
        "read the source as UTF-8, or undo it with text.encode('cp1252').decode('utf-8')",
    ),
    "control_character": (
        "warning", "control characters", NOTHING,
        "remove them; U+0080 to U+009F say that the file has another encoding (--encoding)",
    ),
    "invisible_character": (
        "warning", "characters of no width (zero-width space, byte-order mark, soft hyphen, direction mark)", NOTHING,
        "remove them: they split words into other tokens, unseen",
    ),
    "html": ("note", "HTML entities or tags left over", NOTHING, "html.unescape the text and strip the tags"),
}  # fmt: skip


class Encoding(Collector):
    """Counted by kind. What is mojibake holds control characters by its nature: it is not counted as both."""

    def __init__(self) -> None:
        self._tallies = {kind: Tally() for kind in KINDS}

    def see(self, row: Seen) -> None:
        """ASCII is searched for control characters and HTML alone."""
        if row.marks:
            self._see_ascii(row)
        if len(row.data) != len(row.text):
            self._see_wide(row)

    def findings(self) -> Iterator[Finding]:
        """One for each kind that occurs."""
        for kind, (severity, what, action, fix) in KINDS.items():
            if (tally := self._tallies[kind]).count:
                yield tally.finding(kind, severity, f"{plural(tally.count, 'row')} with {what}", action=action, fix=fix)

    def _see_ascii(self, row: Seen) -> None:
        marks = row.marks
        if b"<" in marks or b"&" in marks:
            self._see_html(row)
        if len(row.data) == len(row.text) and len(marks.translate(None, _CONTROL_BYTES)) != len(marks):
            self._search("control_character", CONTROL, row)

    def _see_wide(self, row: Seen) -> None:
        text = row.text
        self._search("surrogate", SURROGATE, row)
        if "\ufffd" in text:
            self._add("replacement_character", row, text.index("\ufffd"))
        if damaged := mojibake(text):
            self._add("mojibake", row, text.index(damaged.split(" for ")[0]), f"{damaged}: ")
            return
        self._search("control_character", CONTROL, row)
        self._search("invisible_character", INVISIBLE, row)

    def _see_html(self, row: Seen) -> None:
        if match := TAG.search(row.text):
            self._add("html", row, match.start())
            return
        for match in ENTITY.finditer(row.text):
            if html.unescape(match.group()) != match.group():
                self._add("html", row, match.start())
                return

    def _search(self, kind: str, pattern: re.Pattern[str], row: Seen) -> None:
        if match := pattern.search(row.text):
            self._add(kind, row, match.start())

    def _add(self, kind: str, row: Seen, position: int, before: str = "") -> None:
        tally = self._tallies[kind]
        tally.add(row.split, row.number, "" if tally.sample else before + excerpt(row.text, position))
