"""Texts with nothing in them to learn from: empty ones, and ones of punctuation and digits alone."""

from __future__ import annotations

from collections.abc import Iterator

from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import Finding, plural
from lightsft.doctor.samples import excerpt


class Contents(Collector):
    """Of the rows that can be used: where an empty text is an error, the task has said so."""

    def __init__(self) -> None:
        self._empty, self._wordless = Tally(), Tally()

    def see(self, row: Seen) -> None:
        """A text without a letter has none to change the case of, nor one of an alphabet without cases."""
        if not row.usable or row.data.lower() != row.data.upper():
            return
        if not row.text.strip():
            self._empty.add(row.split, row.number, repr(row.text[:20]))
        elif not any(character.isalpha() for character in row.text):
            self._wordless.add(row.split, row.number, excerpt(row.text))

    def findings(self) -> Iterator[Finding]:
        """Empty rows, wordless rows."""
        if self._empty.count:
            title = f"{plural(self._empty.count, 'row')} without a text"
            yield self._empty.finding("no_text", "warning", title, fix="fill them or remove them")
        if self._wordless.count:
            title = f"{plural(self._wordless.count, 'row')} of punctuation or digits alone"
            yield self._wordless.finding("no_letters", "note", title, fix="remove them, unless they mean something")
