"""Lines of a text file, one at a time: decoded each by itself, so that bytes that do not decode cost one row."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from lightsft.data.problems import Problem
from lightsft.errors import DataError

BLOCK = 2**20  # bytes; a multiple of every character width
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # before utf-16: its mark begins with that one's
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class Line(NamedTuple):
    """number: from 1. text: with its line end; U+FFFD for what does not decode. position: bytes read so far."""

    number: int
    text: str
    problem: Problem | None
    position: int


def lines(path: Path, encoding: str) -> Iterator[Line]:
    """Every line of a file (of the file inside, if it ends in .gz), without a byte-order mark.

    Raises DataError for an encoding that Python does not know, a file that is in another one from its first byte
    (UTF-16 read as UTF-8), and a damaged .gz.
    """
    codec = codec_of(path, encoding)
    offset = 0
    with opened(path) as (file, told):
        for number, raw in enumerate(_raw_lines(file, "\n".encode(codec)), 1):
            try:
                text, problem = raw.decode(codec), None
            except UnicodeDecodeError as error:
                text, problem = raw.decode(codec, "replace"), _broken(error, encoding, offset)
            offset += len(raw)
            yield Line(number, text.removeprefix("\ufeff") if number == 1 else text, problem, told() or offset)


def codec_of(path: Path, encoding: str) -> str:
    """Python's name of the encoding, with the byte order that the file's mark says."""
    try:
        b"".decode(encoding)
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise DataError(str(error), expected="an encoding that Python knows, such as utf-8 or latin-1") from error
    with opened(path) as (file, _):
        wide = _wide(file.read(4096))
    if name in ("utf-16", "utf-32"):
        return wide if wide and wide.startswith(name) else f"{name}-le"
    if wide and not name.startswith(wide[:6]):
        raise DataError(
            f"{path} is not {encoding}: its first bytes are {wide[:6]}",
            expected=f"text encoded as {encoding}",
            todo=f"name its encoding: --encoding {wide[:6]}",
        )
    return "utf-8" if name == "utf-8-sig" else name  # the mark is taken off in any case


def _wide(start: bytes) -> str | None:
    """UTF-16 or UTF-32 by the mark, or by zeros in every second byte, which no text in another encoding has."""
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return name
    even, odd = start[0::2], start[1::2]
    if len(start) < 8 or (0 in even and 0 in odd):
        return None
    return "utf-16-le" if odd.count(0) > len(odd) / 2 else "utf-16-be" if even.count(0) > len(even) / 2 else None


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, Callable[[], int]]]:
    """The file's bytes, unpacked if it is a .gz, and a function that says how many packed bytes were read (else 0)."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.open(raw) as file:
                    yield file, raw.tell
            else:
                yield raw, lambda: 0
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged: {error}", expected="a whole .gz file", todo="pack or copy it again"
        ) from error


def _raw_lines(file: IO[bytes] | gzip.GzipFile, end: bytes) -> Iterator[bytes]:
    return iter(file.readline, b"") if end == b"\n" else _wide_lines(file, end)


def _wide_lines(file: IO[bytes] | gzip.GzipFile, end: bytes) -> Iterator[bytes]:
    """Lines that end with `end`, which is found at multiples of its own width alone."""
    rest = b""
    while block := file.read(BLOCK):
        seen, rest, begin = len(rest) - len(rest) % len(end), rest + block, 0
        at = _find(rest, end, seen)
        while at >= 0:
            yield rest[begin : at + len(end)]
            begin = at + len(end)
            at = _find(rest, end, begin)
        rest = rest[begin:]
    if rest:
        yield rest


def _find(text: bytes, end: bytes, begin: int) -> int:
    at = text.find(end, begin)
    while at >= 0 and at % len(end):
        at = text.find(end, at + 1)
    return at


def _broken(error: UnicodeDecodeError, encoding: str, offset: int) -> Problem:
    """Bytes that are no text in the encoding, and one in which they are."""
    at = offset + error.start
    return Problem(
        "broken_encoding",
        f"is not {encoding}: byte {error.object[error.start]:#x} at offset {at}",
        expected=f"text encoded as {encoding}",
        todo=f"name its encoding, for example --encoding {fitting(error.object, encoding)}",
    )


def fitting(raw: bytes, encoding: str) -> str:
    """An encoding in use in which these bytes are text. latin-1 gives every byte a character, so there is one."""
    for name in ("utf-8", "cp1252"):
        with suppress(UnicodeDecodeError):
            letters = raw.decode(name)
            apart = name == "utf-8" or letters != raw.decode("latin-1")  # cp1252 differs where latin-1 has controls
            if apart and codecs.lookup(name) != codecs.lookup(encoding):
                return name
    return "latin-1"
