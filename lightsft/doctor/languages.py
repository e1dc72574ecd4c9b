"""The languages of the texts, by py3langid (Lui and Baldwin 2012) where it is installed, in a bounded sample."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import Finding, percent, plural
from lightsft.doctor.samples import excerpt

SAMPLE, CHARACTERS = 2000, 400  # texts, and how much of each
SHORTEST = 60  # characters: shorter texts are guessed too often
MARGIN = 25.0  # of log likelihood over the second-best language
MAIN_SHARE = 0.9


class LanguageMix(Collector):
    """Holds the SAMPLE texts with the lowest checksums: any order of the rows gives the same ones."""

    def __init__(self) -> None:
        self._sample: list[tuple[int, int, str, int, str]] = []  # a heap: -checksum, tie breaker, split, number, text
        self._seen = 0
        self._languages: Counter[str] = Counter()

    def see(self, row: Seen) -> None:
        """Short texts are left out."""
        if len(row.text) < SHORTEST or not row.usable:
            return
        self._seen += 1
        place = -zlib.crc32(row.data[:CHARACTERS])
        if len(self._sample) < SAMPLE or place > self._sample[0][0]:
            entry = (place, -self._seen, row.split, row.number, row.text[:CHARACTERS])
            (heapq.heappush if len(self._sample) < SAMPLE else heapq.heapreplace)(self._sample, entry)

    def findings(self) -> Iterator[Finding]:
        """Rows of the sample in another language, where nearly all share one."""
        if not find_spec("py3langid") or not self._sample:
            return
        rows: dict[str, Tally] = {}
        for _, _, split, number, text in sorted(self._sample, key=lambda entry: -entry[1]):
            if language := _language(text):
                rows.setdefault(language, Tally()).add(split, number, excerpt(text))
        self._languages = Counter({language: tally.count for language, tally in rows.items()})
        total = self._languages.total()
        if len(rows) > 1 and self._languages.most_common(1)[0][1] >= MAIN_SHARE * total:
            yield self._others(rows, total)

    def figures(self) -> dict[str, Any]:
        """Texts of the sample by language, where it is certain."""
        return {"sampled_texts_by_language": dict(self._languages.most_common())} if self._languages else {}

    def not_checked(self) -> Iterator[str]:
        """Without py3langid, nothing; of many rows, a sample."""
        if not find_spec("py3langid"):
            yield "languages: py3langid is not installed (pip install py3langid)"
        elif self._seen > SAMPLE:
            long = f"{plural(self._seen, 'text')} of {SHORTEST} characters or more"
            yield f"languages: of {long}, {SAMPLE:,} were looked at"

    def _others(self, rows: dict[str, Tally], total: int) -> Finding:
        (main, _), *rest = self._languages.most_common()
        others = Tally()
        for language, _ in rest:
            others.merge(rows[language])
        each = ", ".join(f"{count:,} {language}" for language, count in rest[:5])
        title = (
            f"{plural(others.count, 'row')} in another language than the {main!r} of the rest: {each} "
            f"({percent(others.count, total)} of {plural(total, 'text')} looked at)"
        )
        fix = "nothing if several languages are wanted; else remove these rows"
        return others.finding("other_language", "note", title, fix=fix)


def _language(text: str) -> str:
    """Its code, where the best guess stands well apart from the second."""
    import py3langid  # type: ignore[import-untyped,unused-ignore]

    (best, high), (_, second) = py3langid.rank(text.lower() if text.isupper() else text)[:2]
    return str(best) if high - second >= MARGIN else ""
