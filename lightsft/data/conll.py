"""CoNLL files: a token per line, its columns separated by tabs or blanks, sentences separated by blank lines.

CoNLL-2003 (Tjong Kim Sang and De Meulder, cs/0306050) and what followed have the tag in the last column; CoNLL-U
(universaldependencies.org/format.html) has ten named columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from lightsft.data.parts import WHOLE, Numbered, Part, Parts
from lightsft.data.problems import Problem
from lightsft.data.text_lines import Line, lines

DOCUMENT = "-DOCSTART-"
UNIVERSAL = ("id", "tokens", "lemma", "tags", "xpos", "feats", "head", "deprel", "deps", "misc")
TAG = re.compile(r"O|[BIESLUM]-\S+")
FIRST = re.compile(r"1(-\d+)?")  # the number of CoNLL-U's first token, or of a range that begins with it
PEEKED = 400  # lines that tell the layout


@dataclass(frozen=True)
class Layout:
    """names: the columns in order. separator: a tab, or None for any blanks."""

    names: tuple[str, ...]
    separator: str | None

    @property
    def universal(self) -> bool:
        """Whether the file is CoNLL-U, in which every line that begins with # is a comment."""
        return self.names == UNIVERSAL

    def fields(self, text: str) -> list[str]:
        """The columns of one line."""
        return text.rstrip("\r\n").split(self.separator)

    def skips(self, text: str) -> bool:
        """Comments and document marks. A token that begins with # has the columns of the other tokens."""
        if text.startswith(DOCUMENT):
            return True
        return text.startswith("#") and (self.universal or len(self.fields(text)) != len(self.names))


def conll_parts(path: Path, encoding: str) -> Parts:
    """The sentences of a file: {"tokens", "tags", and a list for each further column}."""
    return {WHOLE: Part(partial(_rows, path, encoding), path.stat().st_size)}


def looks_like_conll(path: Path, encoding: str) -> bool:
    """Whether a text file has the columns of a tagged one: as many in each line, tags in the last."""
    peeked = [line.text for line in islice(lines(path, encoding), PEEKED)]
    layout = _layout(peeked, path)
    tokens = [layout.fields(text) for text in peeked if text.strip() and not layout.skips(text)]
    if layout.universal or len(layout.names) < 2 or not tokens:
        return layout.universal
    return all(len(fields) == len(layout.names) and TAG.fullmatch(fields[-1]) for fields in tokens)


def _layout(peeked: list[str], path: Path) -> Layout:
    """From the first line that is certainly a token."""
    first = next((text for text in peeked if text.strip() and not text.startswith(("#", DOCUMENT))), "")
    separator = "\t" if "\t" in first else None
    fields = first.rstrip("\r\n").split(separator)
    if path.suffix.lower() == ".conllu" or (len(fields) == len(UNIVERSAL) and FIRST.fullmatch(fields[0]) and separator):
        return Layout(UNIVERSAL, "\t")
    between = [f"column{number}" for number in range(2, len(fields))]
    return Layout(("tokens", *between, "tags"), separator) if len(fields) > 1 else Layout(("tokens",), separator)


def _rows(path: Path, encoding: str) -> Iterator[Numbered]:
    layout = _layout([line.text for line in islice(lines(path, encoding), PEEKED)], path)
    for number, sentence in enumerate(_sentences(lines(path, encoding), layout), 1):
        problem = next((one for line in sentence if (one := _problem(line, layout))), None)
        row = None if problem else _row(sentence, layout)
        yield Numbered(number, row, problem, sentence[0].number, sentence[-1].position)


def _sentences(source: Iterator[Line], layout: Layout) -> Iterator[list[Line]]:
    sentence: list[Line] = []
    for line in source:
        if line.text.strip():
            if not layout.skips(line.text):
                sentence.append(line)
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _problem(line: Line, layout: Layout) -> Problem | None:
    found = len(layout.fields(line.text))
    if line.problem or found == len(layout.names) > 1:
        return line.problem
    return Problem(
        "ragged_lines",
        f"has {found} columns instead of {max(2, len(layout.names))} in line {line.number}",
        expected="a token and its tag in each line, with as many columns as in the first",
        todo="correct the line; sentences are separated by blank lines",
    )


def _row(sentence: list[Line], layout: Layout) -> dict[str, list[str]]:
    columns = list(zip(*(layout.fields(line.text) for line in sentence), strict=True))
    row = dict(zip(layout.names, map(list, columns), strict=True))
    if layout.universal:  # ranges of words written as one (1-2) and words that are not written (1.1) are no tokens
        kept = [index for index, one in enumerate(row.pop("id")) if one.isdigit()]
        row = {name: [values[index] for index in kept] for name, values in row.items()}
    return {"tokens": row.pop("tokens"), "tags": row.pop("tags"), **row}
