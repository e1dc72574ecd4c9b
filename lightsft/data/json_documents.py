"""A whole JSON document: a list of rows, splits by name, {"data": [...]}, or SQuAD's paragraphs. Read into memory."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightsft.data.json_lines import broken, checked, json_lines_parts
from lightsft.data.parts import WHOLE, Numbered, Part, Parts, numbered, split_name
from lightsft.data.problems import Problem
from lightsft.data.squad import is_squad, questions
from lightsft.data.text_lines import lines
from lightsft.errors import DataError

EXPECTED = (
    'a list of objects, {"train": [...], "validation": [...]}, {"data": [...]}, SQuAD\'s paragraphs, '
    "or one JSON object per line"
)
BLANK = " \t\r\n"


def json_parts(path: Path, encoding: str) -> Parts:
    """The rows of a document. One object per line under the name .json is read as that."""
    read = list(lines(path, encoding))
    text, size = "".join(line.text for line in read), path.stat().st_size
    if text.lstrip(BLANK).startswith("["):
        damaged = [(len(line.text), line.problem) for line in read]
        return {WHOLE: Part(partial(_elements, text, damaged, size), size)}
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return json_lines_parts(path, encoding)
        raise DataError(f"{path}: row 1 {broken(error, 1).found}", expected=EXPECTED) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", expected=EXPECTED) from error
    problem = next((line.problem for line in read if line.problem), None)
    if problem:
        raise DataError(f"{path} {problem.found}", expected=problem.expected, todo=problem.todo)
    return _of_document(document, path, size)


def _of_document(document: Any, path: Path, size: int) -> Parts:
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a JSON {type(document).__name__}", expected=EXPECTED)
    named = {name: value for name, value in document.items() if split_name(name)} or {WHOLE: document}
    parts = {name: _rows_within(value) for name, value in named.items()}
    found = {name: Part(partial(_stream, rows, size), size) for name, rows in parts.items() if rows is not None}
    if not found:
        raise DataError(f"{path} holds a JSON dict of {', '.join(map(repr, document))}"[:300], expected=EXPECTED)
    return found


def _rows_within(value: Any) -> list[Any] | None:
    """A list itself, or what {"data": [...]} holds."""
    inner = value.get("data") if isinstance(value, dict) else value
    return inner if isinstance(inner, list) else None


def _stream(rows: list[Any], size: int) -> Iterator[Numbered]:
    return questions(rows, size) if is_squad(rows) else numbered(rows, size)


def _elements(text: str, damaged: list[tuple[int, Problem | None]], size: int) -> Iterator[Numbered]:
    """A list's elements one by one, so that what is wrong with one has its number.

    damaged: for each line its length and what is wrong with it. After JSON that does not parse nothing follows: where
    the next element begins is not known.
    """
    ends, number = list(accumulate(length for length, _ in damaged)), 0
    try:
        for number, (row, begin, end) in enumerate(_decoded(text), 1):
            first, last = bisect_right(ends, begin), bisect_right(ends, end - 1)
            problem = next((one for _, one in damaged[first : last + 1] if one), None)
            problem = problem or checked(row, text[begin:end])
            yield Numbered(number, None if problem else row, problem, first + 1, size)
    except json.JSONDecodeError as error:
        yield Numbered(number + 1, None, broken(error, 1), error.lineno, size)


def _decoded(text: str) -> Iterator[tuple[Any, int, int]]:
    """Each element of a list with where it begins and ends."""
    decoder, at = json.JSONDecoder(), text.index("[")
    at = _skip(text, at + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # too many digits or brackets
            raise json.JSONDecodeError(str(error), text, at) from error
        yield row, at, end
        at = _skip(text, end)
        closed = text[at : at + 1] == "]"
        if text[at : at + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = at if closed else _skip(text, at + 1)
    if _skip(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, _skip(text, at + 1))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in BLANK:
        at += 1
    return at
