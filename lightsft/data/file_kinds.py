"""Which reader a file's name calls for. A kind of file is a reader and an entry in this table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightsft.data.conll import conll_parts
from lightsft.data.json_documents import json_parts
from lightsft.data.json_lines import json_lines_parts
from lightsft.data.parts import Parts
from lightsft.data.plain_text import text_parts
from lightsft.data.separated import separated_parts
from lightsft.data.tables import arrow_parts, parquet_parts
from lightsft.errors import DataError

READERS: dict[str, Callable[[Path, str], Parts]] = {
    ".csv": separated_parts,
    ".tsv": partial(separated_parts, separator="\t"),
    ".jsonl": json_lines_parts,
    ".json": json_parts,
    ".parquet": parquet_parts,
    ".arrow": arrow_parts,
    ".feather": arrow_parts,
    ".conll": conll_parts,
    ".conllu": conll_parts,
    ".bio": conll_parts,
    ".iob": conll_parts,
    ".iob2": conll_parts,
    ".txt": text_parts,
}
PACKED = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".conll", ".conllu", ".bio", ".iob", ".iob2")  # also as .gz
KINDS = ", ".join(READERS)


def kind_of(path: Path) -> str | None:
    """The key in READERS, looking past .gz; None where there is none."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in (PACKED if packed else READERS) else None


def file_parts(path: Path, encoding: str) -> Parts:
    """What a file holds. Raises DataError for one that is missing, empty or of no known kind."""
    kind = kind_of(path)
    if not path.is_file():
        raise DataError(f"no file {path}", expected=f"a {KINDS} file", todo="check the path")
    if kind is None:
        raise DataError(f"{path} is of no kind that is read", expected=f"a {KINDS} file", todo="convert or rename it")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", expected="a header and at least one row")
    return READERS[kind](path, encoding)
