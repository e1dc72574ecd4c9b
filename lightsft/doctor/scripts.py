"""The scripts that the texts are written in: rows in another one than most, words in two at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lightsft.doctor.alphabets import disguised_word, script_counts
from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import Finding, percent, plural
from lightsft.doctor.samples import excerpt

MAIN_SHARE = 0.9  # of the rows: below, the data is in several scripts and no row stands out


class ScriptMix(Collector):
    """The main script of each row is the one with most letters."""

    def __init__(self) -> None:
        self._rows: dict[str, Tally] = {}
        self._disguised = Tally()

    def see(self, row: Seen) -> None:
        """ASCII letters are Latin."""
        if len(row.data) == len(row.text):
            main = "Latin" if row.text.lower() != row.text.upper() else ""
        else:
            counts = script_counts(row.text)
            main = max(counts, key=counts.__getitem__) if counts else ""
            if counts["Latin"] and (counts["Cyrillic"] or counts["Greek"]):
                self._look_for_disguise(row)
        if main:
            tally = self._rows.get(main)
            if tally is None:
                tally = self._rows[main] = Tally()
            tally.add(row.split, row.number, "" if tally.sample else excerpt(row.text))

    def findings(self) -> Iterator[Finding]:
        """Rows in another script where nearly all share one; words in two."""
        total = sum(tally.count for tally in self._rows.values())
        main = max(self._rows, key=lambda script: self._rows[script].count, default="")
        if main and self._rows[main].count < total and self._rows[main].count >= MAIN_SHARE * total:
            yield self._others(main, total)
        if self._disguised.count:
            yield self._disguised.finding(
                "mixed_scripts",
                "warning",
                f"{plural(self._disguised.count, 'row')} with a word of letters from two alphabets that look alike",
                fix="write the word in one alphabet: its tokens are not those of the word it looks like",
            )

    def figures(self) -> dict[str, Any]:
        """Rows by main script."""
        rows = Counter({script: tally.count for script, tally in self._rows.items()})
        return {"rows_by_script": dict(rows.most_common())}

    def _others(self, main: str, total: int) -> Finding:
        others, names = Tally(), []
        for script in sorted(self._rows, key=lambda script: -self._rows[script].count):
            if script != main:
                others.merge(self._rows[script])
                names.append(f"{self._rows[script].count:,} {script}")
        title = (
            f"{plural(others.count, 'row')} in another script than the {main} of the rest "
            f"({percent(others.count, total)}: {', '.join(names[:5])})"
        )
        fix = "nothing if several languages are wanted; else remove these rows"
        return others.finding("other_script", "note", title, fix=fix)

    def _look_for_disguise(self, row: Seen) -> None:
        if word := disguised_word(row.text):
            spelled = "".join(c if c.isascii() else f"[{c} U+{ord(c):04X}]" for c in word)
            self._disguised.add(row.split, row.number, excerpt(spelled))
