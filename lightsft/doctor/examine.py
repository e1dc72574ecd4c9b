"""One pass over the rows of every split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from lightsft.data.problems import Problem
from lightsft.doctor.collect import Checked, Collector, seen
from lightsft.doctor.contents import Contents
from lightsft.doctor.duplicates import Duplicates
from lightsft.doctor.encoding import Encoding
from lightsft.doctor.findings import Finding, by_severity
from lightsft.doctor.labels import Labels
from lightsft.doctor.languages import LanguageMix
from lightsft.doctor.lengths import TokenLengths, WordLengths
from lightsft.doctor.personal import PersonalData
from lightsft.doctor.report import Report
from lightsft.doctor.row_problems import RowProblems
from lightsft.doctor.scripts import ScriptMix
from lightsft.doctor.special_tokens import SpecialTokens

PROGRESS_EVERY = 500  # rows
Progress = Callable[[str, int, int], object]  # split, rows read, position in bytes


class NumberedRow(Protocol):
    """A row as a reader hands it out."""

    @property
    def number(self) -> int:
        """From 1."""

    @property
    def row(self) -> Mapping[str, Any] | None:
        """None where the reader could not make one."""

    @property
    def problem(self) -> Problem | None:
        """What the reader has to say about it."""

    @property
    def position(self) -> int:
        """In bytes, of the file."""


def examine(
    splits: Mapping[str, Iterable[NumberedRow]],
    task: Checked,
    tokenizer: Any = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read every split once, in the order given ("train" first), and say what is wrong with it.

    Memory: 20 bytes a row (and 40 more while the duplicates are counted), 50 MB for the shingles of the texts that are
    compared (100 while they are), 130 MB for py3langid where it is installed. `max_length` counts tokens. `progress` is
    called every PROGRESS_EVERY rows and at the end of a split. Errors that the reader raises pass through.
    """
    began = time.perf_counter()
    examination = _Examination(task, tokenizer, max_length)
    for split, rows in splits.items():
        examination.read(split, rows, progress)
    return examination.report(began)


class _Examination:
    def __init__(self, task: Checked, tokenizer: Any, max_length: int | None) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._rows: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._problems = RowProblems()
        self._collectors: list[Collector] = [
            Labels(),
            Duplicates(),
            TokenLengths(tokenizer, max_length) if tokenizer is not None else WordLengths(max_length),
            Encoding(),
            SpecialTokens(tokenizer),
            ScriptMix(),
            LanguageMix(),
            PersonalData(),
            Contents(),
        ]

    def read(self, split: str, rows: Iterable[NumberedRow], progress: Progress | None) -> None:
        """Show each row of a split to the collectors."""
        read = refused = position = 0
        self._rows[split] = self._refused[split] = 0
        for numbered in rows:
            read, position = read + 1, numbered.position
            refused += not self._see(split, numbered)
            if progress is not None and read % PROGRESS_EVERY == 0:
                progress(split, read, position)
        if progress is not None:
            progress(split, read, position)
        self._rows[split], self._refused[split] = read, refused

    def report(self, began: float) -> Report:
        """What all of them found; `began` on the performance counter."""
        findings: list[Finding] = list(self._problems.findings())
        figures: dict[str, Any] = {}
        not_checked: list[str] = []
        for collector in self._collectors:
            findings += collector.findings()
            figures |= collector.figures()
            not_checked += collector.not_checked()
        empty = [split for split, count in self._rows.items() if not count]
        if empty or not self._rows:
            title = f"not a single row{' in ' + ' and '.join(empty) if empty else ''}"
            findings.append(
                Finding("no_rows", "error", title, 0, action="stops", fix="check the file, or how it is split")
            )
        seconds = time.perf_counter() - began
        return Report(
            tuple(by_severity(findings)), self._rows, self._refused, figures, tuple(not_checked), round(seconds, 3)
        )

    def _see(self, split: str, numbered: NumberedRow) -> bool:
        """Whether the row can be used."""
        problems, text, classes = self._read(numbered)
        for problem in problems:
            self._problems.add(split, numbered.number, problem)
        usable = all(problem.severity != "error" for problem in problems)
        if text is not None:
            row = seen(split, numbered.number, text, classes, usable)
            for collector in self._collectors:
                collector.see(row)
        return usable and text is not None

    def _read(self, numbered: NumberedRow) -> tuple[list[Problem], str | None, tuple[str, ...]]:
        """What is wrong with a row, its text and its labels, as far as there are any."""
        problems = [numbered.problem] if numbered.problem is not None else []
        row, task = numbered.row, self._task
        if row is None:
            return problems, None, ()
        try:
            problems += task.problems(row)
            text, classes = task.text_of(row), task.classes(row)
            if self._tokenizer is not None and all(problem.severity != "error" for problem in problems):
                problems += task.token_problems(row, self._tokenizer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if all(problem.severity != "error" for problem in problems):  # else it has been said what is wrong
                found = f"cannot be turned into a text ({type(error).__name__}: {error})"
                problems.append(Problem("unreadable_row", found))
            return problems, None, ()
        return problems, text, classes
