"""A .txt file: a row per line, or CoNLL sentences where its lines are tokens and tags."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lightsft.data.conll import conll_parts, looks_like_conll
from lightsft.data.parts import WHOLE, Numbered, Part, Parts
from lightsft.data.text_lines import lines


def text_parts(path: Path, encoding: str) -> Parts:
    """{"text"} for each line that is not blank."""
    if looks_like_conll(path, encoding):
        return conll_parts(path, encoding)
    return {WHOLE: Part(partial(_rows, path, encoding), path.stat().st_size)}


def _rows(path: Path, encoding: str) -> Iterator[Numbered]:
    filled = (line for line in lines(path, encoding) if line.problem or line.text.strip())
    for number, line in enumerate(filled, 1):
        row = None if line.problem else {"text": line.text.rstrip("\r\n")}
        yield Numbered(number, row, line.problem, line.number, line.position)
