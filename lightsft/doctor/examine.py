"""One pass over the rows of every split."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightsft.data.parts import Numbered
from lightsft.data.problems import Problem
from lightsft.doctor.collect import Collector, Seen, seen
from lightsft.doctor.contents import Contents
from lightsft.doctor.duplicates import Duplicates
from lightsft.doctor.encoding import Encoding
from lightsft.doctor.findings import Finding, by_severity, percent
from lightsft.doctor.labels import Labels
from lightsft.doctor.languages import LanguageMix
from lightsft.doctor.lengths import TokenLengths, WordLengths
from lightsft.doctor.personal import PersonalData
from lightsft.doctor.report import Report
from lightsft.doctor.row_problems import RowProblems
from lightsft.doctor.scripts import ScriptMix
from lightsft.doctor.shared_keys import SharedKeys
from lightsft.doctor.special_tokens import SpecialTokens
from lightsft.errors import DataError

if TYPE_CHECKING:
    from lightsft.tasks.base import Task

CHECKED = "rows, labels, duplicates, leakage"
CHECKED_IN_TEXTS = ", lengths, encoding, special tokens, scripts, languages, personal data, empty texts"
PROGRESS_EVERY = 500  # rows
Progress = Callable[[str, int, int], object]  # split, rows read, position in bytes


def examine(
    splits: Mapping[str, Iterable[Numbered]],
    task: Task,
    tokenizer: Any = None,
    progress: Progress | None = None,
    share: float = 1.0,
) -> Report:
    """Read every split once, in the order given ("train" first), and say what is wrong with it.

    Memory: 20 bytes a row (and 40 more while the duplicates are counted), 50 MB for the shingles of the texts that are
    compared (100 while they are), 130 MB for py3langid where it is installed. `progress` is called every PROGRESS_EVERY
    rows and at the end of a split. share: of the rows, chosen by hash of their text, that are looked at for anything
    but labels and equal texts. Errors that the reader raises pass through.
    """
    began = time.perf_counter()
    examination = _Examination(task, tokenizer if task.reads_text else None, share)
    for split, rows in splits.items():
        examination.read(split, rows, progress)
    return examination.report(began)


class _Examination:
    def __init__(self, task: Task, tokenizer: Any, share: float) -> None:
        self._task, self._tokenizer, self._share = task, tokenizer, share
        self._rows: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._first: dict[str, Mapping[str, Any]] = {}
        self._problems = RowProblems()
        what = "text" if task.reads_text else "file"
        self._of_all: list[Collector] = [Labels(), Duplicates(what=what, nearly=task.compares_nearly)]
        self._has_key = bool(task.key_name)
        if self._has_key:
            self._of_all.append(SharedKeys(task.key_name))
        self._of_some = _of_texts(task, tokenizer) if task.reads_text else []

    def read(self, split: str, rows: Iterable[Numbered], progress: Progress | None) -> None:
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
        for collector in (*self._of_all, *self._of_some):
            findings += collector.findings()
            figures |= collector.figures()
            not_checked += collector.not_checked()
        if self._share < 1:
            some = f"{percent(self._share, 1)} of the rows, chosen by hash of their text"
            not_checked.append(f"texts: {some}, were looked at for lengths, characters, scripts and personal data")
        empty = [split for split, count in self._rows.items() if not count]
        if empty or not self._rows:
            title = f"not a single row{' in ' + ' and '.join(empty) if empty else ''}"
            findings.append(
                Finding("no_rows", "error", title, 0, action="stops", fix="check the file, or how it is split")
            )
        seconds = time.perf_counter() - began
        return Report(
            tuple(by_severity(findings)),
            self._rows,
            self._refused,
            figures,
            tuple(not_checked),
            round(seconds, 3),
            CHECKED + CHECKED_IN_TEXTS * bool(self._of_some),
            self._first,
        )

    def _see(self, split: str, numbered: Numbered) -> bool:
        """Whether the row can be used."""
        problems, row = self._read(split, numbered)
        for problem in problems:
            self._problems.add(split, numbered.number, problem)
        if row is None:
            return False
        for collector in self._of_all:
            collector.see(row)
        if self._chosen(row.text):
            for collector in self._of_some:
                collector.see(row)
        if row.usable and numbered.row is not None:
            self._first.setdefault(split, numbered.row)
        return row.usable

    def _read(self, split: str, numbered: Numbered) -> tuple[list[Problem], Seen | None]:
        """What is wrong with a row, and what collectors see of it, as far as there is anything."""
        problems = [numbered.problem] if numbered.problem is not None else []
        row, task = numbered.row, self._task
        if row is None:
            return problems, None
        inputs: list[tuple[str, ...]] = []
        try:
            problems += task.problems(row)
            text, compared, classes = task.all_text(row), task.compared(row), task.classes(row)
            key = task.key(row) if self._has_key else ""
            if _none_is_error(problems) and task.reads_text and self._chosen(text):
                if self._tokenizer is not None:
                    problems += task.token_problems(row, self._tokenizer)
                inputs = task.inputs(row, self._tokenizer) if _none_is_error(problems) else []
        except (LookupError, TypeError, ValueError, AttributeError, OSError, DataError) as error:
            if _none_is_error(problems):  # else it has been said what is wrong
                found = f"cannot be turned into a text ({type(error).__name__}: {error})"
                problems.append(Problem("unreadable_row", found))
            return problems, None
        compared = text if compared == text else compared  # one object, so that it is encoded once
        usable = _none_is_error(problems)
        return problems, seen(split, numbered.number, text, classes, usable, compared=compared, inputs=inputs, key=key)

    def _chosen(self, text: str) -> bool:
        return self._share >= 1 or zlib.crc32(text.encode("utf-8", "surrogatepass")) < self._share * 2**32


def _of_texts(task: Task, tokenizer: Any) -> list[Collector]:
    limit = getattr(task, "max_length", None)
    lengths = (
        WordLengths(limit if task.cuts else None)
        if tokenizer is None
        else TokenLengths(tokenizer, limit, cuts=task.cuts, special=task.adds_special_tokens)
    )
    return [lengths, Encoding(), SpecialTokens(tokenizer), ScriptMix(), LanguageMix(), PersonalData(), Contents()]


def _none_is_error(problems: Iterable[Problem]) -> bool:
    return all(problem.severity != "error" for problem in problems)
