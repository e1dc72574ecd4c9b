"""One JSON object per line (jsonl). A line that is not one costs that row alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightsft.data.parts import WHOLE, Numbered, Part, Parts, not_an_object
from lightsft.data.problems import Problem
from lightsft.data.text_lines import lines

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair


def json_lines_parts(path: Path, encoding: str) -> Parts:
    """The rows of a file. Lines end at line feeds alone: other separators may stand in a text."""
    return {WHOLE: Part(partial(_rows, path, encoding), path.stat().st_size)}


def _rows(path: Path, encoding: str) -> Iterator[Numbered]:
    number = 0
    for line in lines(path, encoding):
        if not line.problem and not line.text.strip():
            continue
        number += 1
        row, problem = (None, line.problem) if line.problem else parse(line.text.rstrip(), line.number)
        problem = problem or checked(row, line.text)
        yield Numbered(number, None if problem else row, problem, line.number, line.position)


def parse(text: str, line: int) -> tuple[Any, Problem | None]:
    """The value of a text that begins in this line, or the problem with it."""
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python converts
        return None, broken(error, line)


def broken(error: Exception, line: int) -> Problem:
    """What json says of a text that begins in this line."""
    line += getattr(error, "lineno", 1) - 1
    reason = getattr(error, "msg", str(error))
    return Problem("broken_json", f"in line {line} is not JSON: {reason}", expected="one JSON object per line")


def checked(row: Any, text: str) -> Problem | None:
    """A row is an object, and its texts are texts: JSON can escape half of a character, which no encoding writes."""
    if not HALF.search(text):
        return not_an_object(row)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"holds \\u{ord(error.object[error.start]):04x}, half of a surrogate pair"
        return Problem("half_character", half, expected="whole characters", todo="correct or remove it")
    return not_an_object(row)
