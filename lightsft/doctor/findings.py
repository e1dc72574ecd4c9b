"""A finding: what is wrong with the data, in which rows, what training will do about it, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightsft.data.problems import Severity

FIRST_ROWS = 20  # row numbers kept for each split
LINE_ROWS = 5  # of these, in one line
RANK: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
NOTHING = "nothing: training goes on with these rows"


@dataclass(frozen=True)
class Finding:
    """One kind of problem in all of the data.

    title: a sentence with the figures. count: rows concerned (or labels, where the title says so).
    rows: the numbers (from 1) of the first FIRST_ROWS of each split. sample: one short example, personal data masked.
    action: what training will do. fix: how to mend it.
    """

    code: str
    severity: Severity
    title: str
    count: int
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sample: str = ""
    action: str = NOTHING
    fix: str = ""

    def line(self) -> str:
        """warning: 3 rows with an e-mail address (rows train 4, 9, 17): all but the sample in one line."""
        where = first_rows(self.rows)
        return f"{self.severity}: {self.title}" + (f" (rows {where})" if where else "")

    def as_json(self) -> dict[str, Any]:
        """Its fields; rows as lists."""
        return {**asdict(self), "rows": {split: list(numbers) for split, numbers in self.rows.items()}}


def first_rows(rows: Mapping[str, Sequence[int]], most: int = LINE_ROWS) -> str:
    """`train 4, 9, 17; test 3`: at most so many of each split."""
    parts = []
    for split, numbers in rows.items():
        parts.append(f"{split} {', '.join(map(str, numbers[:most]))}{', ...' if len(numbers) > most else ''}")
    return "; ".join(parts)


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Errors first, then by the number of rows."""
    return sorted(findings, key=lambda finding: (RANK[finding.severity], -finding.count, finding.code))


def plural(count: int, one: str, many: str = "") -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def percent(part: float, whole: float) -> str:
    """A share with two figures: `0.12 %`, `3.4 %`, `27 %`; `0 %` of nothing."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.2g} %"
