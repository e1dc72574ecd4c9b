"""What a collector is, what it sees of each row, and how it keeps count of rows in bounded memory."""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lightsft.data.problems import Severity
from lightsft.doctor.findings import FIRST_ROWS, NOTHING, Finding

# Bytes that no pattern looks for. What is left of a text: digits, @ + & < > [ ] |, and control characters.
_PLAIN = (string.ascii_letters + " \t\n\r,.;:!?'\"()-_/\\*#$%^=~{}`").encode() + bytes(range(128, 256))
DIGITS = b"0123456789"


class Seen(NamedTuple):
    """One row as collectors see it.

    usable: neither reader nor task reported an error. data: the text as UTF-8. marks: the characters of `data` that
    patterns look for, in their order: where there is no "@" among them, no e-mail address has to be searched.
    compared: what equal rows share, mostly the text. inputs: what is tokenized as one; none where that is not asked.
    key: what rows of one split may share and rows of two may not, where it is not all of it.
    """

    split: str
    number: int
    text: str
    classes: tuple[str, ...]
    usable: bool
    data: bytes
    marks: bytes
    compared: str
    inputs: tuple[tuple[str, ...], ...] = ()
    key: str = ""


def seen(
    split: str,
    number: int,
    text: str,
    classes: tuple[str, ...] = (),
    usable: bool = True,
    *,
    compared: str | None = None,
    inputs: Iterable[tuple[str, ...]] = (),
    key: str = "",
) -> Seen:
    """A row with what is derived from its text."""
    data = text.encode("utf-8", "surrogatepass")
    marks, same = data.translate(None, _PLAIN), text if compared is None else compared
    return Seen(split, number, text, classes, usable, data, marks, same, tuple(inputs), key)


class Collector(ABC):
    """Sees every row once and answers with findings at the end."""

    @abstractmethod
    def see(self, row: Seen) -> None:
        """Take note of one row."""

    @abstractmethod
    def findings(self) -> Iterator[Finding]:
        """What was found; asked once, after the last row."""

    def figures(self) -> dict[str, Any]:
        """What is worth knowing about the data, right or wrong."""
        return {}

    def not_checked(self) -> Iterator[str]:
        """What was left out, and why."""
        return iter(())


class Tally:
    """How many rows have something, the first of them in each split, and one example."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: dict[str, list[int]] = {}
        self.sample = ""

    def add(self, split: str, number: int, sample: str = "") -> None:
        """Count a row; the first example given is kept."""
        self.count += 1
        first = self.rows.setdefault(split, [])
        if len(first) < FIRST_ROWS:
            first.append(number)
        self.sample = self.sample or sample

    def merge(self, other: Tally) -> None:
        """Count the rows of another as well."""
        self.count += other.count
        for split, numbers in other.rows.items():
            self.rows[split] = sorted({*self.rows.get(split, []), *numbers})[:FIRST_ROWS]
        self.sample = self.sample or other.sample

    def finding(self, code: str, severity: Severity, title: str, *, action: str = NOTHING, fix: str = "") -> Finding:
        """As a finding."""
        rows = {split: tuple(numbers) for split, numbers in self.rows.items()}
        return Finding(code, severity, title, self.count, rows, self.sample, action, fix)
