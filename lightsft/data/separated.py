"""Fields between separators (csv, tsv), a record at a time. A record that does not parse costs that record alone."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from lightsft.data.parts import WHOLE, Numbered, Part, Parts
from lightsft.data.problems import Problem
from lightsft.data.text_lines import Line, lines
from lightsft.errors import DataError

LONGEST_RECORD = 2**26  # characters: an open quote is given up there, so that memory is bounded
QUOTING = "quote fields that contain the separator or a line break, and double the quotes inside them"
EXPECTED = "a header and the same number of fields in every row"


def separated_parts(path: Path, encoding: str, separator: str | None = None) -> Parts:
    """The rows of a file. separator: None takes the one of , ; and tab that the header has."""
    return {WHOLE: Part(partial(_rows, path, encoding, separator), path.stat().st_size)}


def _rows(path: Path, encoding: str, separator: str | None) -> Iterator[Numbered]:
    """Strict: each row has the header's number of fields, quotes are closed. Blank lines are skipped."""
    feed = _Feed(_pieces(lines(path, encoding)))
    reader = csv.reader(feed, delimiter=separator or feed.separator(), strict=True)
    header = _header(reader, feed, path)
    for number, (fields, problem) in enumerate(_records(reader, feed), 1):
        problem = problem or _problem(fields, header, feed.taken)
        row = None if problem else dict(zip(header, fields, strict=True))
        yield Numbered(number, row, problem, feed.taken[0].number, feed.taken[-1].position)


def _records(reader: Iterator[list[str]], feed: _Feed) -> Iterator[tuple[list[str], Problem | None]]:
    """Every record, or what is wrong with it. One with an open quote ends with its first line."""
    fields: list[str] | None = []
    while fields is not None:
        try:
            fields = _record(reader, feed)
            if fields:
                yield fields, None
        except csv.Error as error:
            found = f"does not parse: {error} in line {feed.taken[0].number}"
            feed.give_back()
            yield [], Problem("broken_quotes", found, EXPECTED, QUOTING)


def _problem(fields: list[str], header: list[str], taken: list[Line]) -> Problem | None:
    broken = next((line.problem for line in taken if line.problem), None)
    if broken or len(fields) == len(header):
        return broken
    found = f"has {len(fields)} fields instead of {len(header)} in line {taken[0].number}"
    return Problem("wrong_fields", found, EXPECTED, QUOTING)


def _header(reader: Iterator[list[str]], feed: _Feed, path: Path) -> list[str]:
    try:
        header = _record(reader, feed)
        while header == []:  # blank lines above it
            header = _record(reader, feed)
    except csv.Error as error:
        raise DataError(f"{path} does not parse: {error} in its header", expected=EXPECTED, todo=QUOTING) from error
    broken = next((line.problem for line in feed.taken if line.problem), None)
    if broken:
        raise DataError(f"{path}: the header {broken.found}", expected=broken.expected, todo=broken.todo)
    header = header or []
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the header names {', '.join(map(repr, twice))} twice",
            expected="a name of its own for every column",
            todo="rename one of them",
        )
    return header


def _record(reader: Iterator[list[str]], feed: _Feed) -> list[str] | None:
    """The next record; [] for a blank line, None at the end."""
    feed.begin()
    limit = csv.field_size_limit(2**31 - 1)  # texts may be long
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


class _Feed:
    """Lines for csv.reader, which remembers those of the record at hand and can be given them back."""

    def __init__(self, source: Iterator[Line]) -> None:
        self.source, self.waiting = source, deque[Line]()
        self.begin()

    def begin(self) -> None:
        """A record begins with the next line."""
        self.taken: list[Line] = []
        self.characters = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self.waiting.popleft() if self.waiting else next(self.source)
        self.taken.append(line)
        self.characters += len(line.text)
        if len(self.taken) > 1 and self.characters > LONGEST_RECORD:
            raise csv.Error(f"a quote is not closed within {LONGEST_RECORD:,} characters")
        return line.text

    def give_back(self) -> None:
        """All but the first line of a record that did not parse: it is the one with the open quote."""
        self.waiting.extendleft(reversed(self.taken[1:]))
        self.taken = self.taken[:1]

    def separator(self) -> str:
        """The separator of the first line."""
        first = next(self, "")
        self.waiting.extendleft(self.taken)
        return "," if "," in first else max(";\t", key=first.count) if re.search("[;\t]", first) else ","


def _pieces(source: Iterable[Line]) -> Iterator[Line]:
    """Lines that end with a carriage return alone, as older spreadsheets write them, are lines too."""
    for line in source:
        if "\r" not in line.text[:-2]:
            yield line
            continue
        for piece in re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", line.text):
            yield line._replace(text=piece)
