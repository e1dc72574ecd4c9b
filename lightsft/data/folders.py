"""Folders of files: texts, images and sounds by label, and files or folders named for their splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightsft.data.data_sets import is_saved, saved_parts
from lightsft.data.file_kinds import file_parts, kind_of
from lightsft.data.parts import ALIASES, WHOLE, Numbered, Part, Parts, choose, split_name
from lightsft.data.problems import Problem
from lightsft.data.text_lines import lines
from lightsft.errors import DataError

MEMBERS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
    "text": (".txt",),
}
SPLIT = re.compile(rf"({'|'.join(name for names in ALIASES.values() for name in names)})([-_.].*)?", re.IGNORECASE)
EXPECTED = (
    "what save_to_disk wrote, label/*.txt (or images, or sounds), a folder of .txt files, or files or folders named "
    "train, validation and test"
)
Member = tuple[Path, str | None]  # a file and its label


def folder_parts(folder: Path, encoding: str) -> Parts:
    """The rows of a folder, by split where its files or all its folders are named for splits, train among them."""
    if is_saved(folder):
        return saved_parts(folder)
    named = {split: _joined(paths, split, encoding) for split, paths in _by_split(folder).items()}
    if named:
        return named
    whole = _labelled(folder, encoding)
    if whole is None:
        raise DataError(
            f"{folder} is a folder, but not a saved data set, nor one of texts, images or sounds", expected=EXPECTED
        )
    return {WHOLE: whole}


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """Files and folders by the split that their names begin with."""
    children = _visible(folder.iterdir())
    folders = [path for path in children if path.is_dir()]
    if not all(split_name(path.name) for path in folders):  # labels, one of which may be called train
        return {}
    found: dict[str, list[Path]] = {}
    for path in [*folders, *(path for path in children if kind_of(path))]:
        match = SPLIT.fullmatch(path.name)
        if match:
            found.setdefault(str(split_name(match[1])), []).append(path)
    return found if "train" in found else {}


def _joined(paths: Sequence[Path], split: str, encoding: str) -> Part:
    """Several files and folders one after the other."""
    parts = [part for path in paths for part in _parts_of(path, split, encoding)]
    return Part(partial(_one_after_the_other, parts), sum(part.size_bytes for part in parts))


def _parts_of(path: Path, split: str, encoding: str) -> list[Part]:
    if path.is_file():
        return [choose(file_parts(path, encoding), split, str(path))]
    labelled = _labelled(path, encoding)
    if labelled:
        return [labelled]
    files = [file for file in _visible(path.iterdir()) if kind_of(file)]
    if not files:
        raise DataError(f"the folder {path} holds no rows", expected=EXPECTED)
    return [choose(file_parts(file, encoding), split, str(file)) for file in files]


def _one_after_the_other(parts: Sequence[Part]) -> Iterator[Numbered]:
    number, position = 0, 0
    for part in parts:
        for one in part.open():
            number += 1
            yield one._replace(number=number, position=position + one.position)
        position += part.size_bytes


def _labelled(folder: Path, encoding: str) -> Part | None:
    """The texts, images or sounds below a folder: in a folder per label, else flat. Texts beside others are notes."""
    below: list[Member] = [
        (path, label.name) for label in _visible(folder.iterdir()) if label.is_dir() for path in label.rglob("*")
    ]
    for members in (below, [(path, None) for path in folder.iterdir()]):
        kinds = {kind: _of_kind(members, suffixes) for kind, suffixes in MEMBERS.items()}
        if kinds["image"] and kinds["audio"]:
            raise DataError(f"{folder} holds both images and sounds", expected="one kind", todo="name a folder of one")
        for kind, found in kinds.items():
            if found:
                size = sum(path.stat().st_size for path, _ in found)
                return Part(partial(_rows, kind, found, encoding), size)
    return None


def _of_kind(members: Sequence[Member], suffixes: Sequence[str]) -> list[Member]:
    found = [(path, label) for path, label in members if path.suffix.lower() in suffixes and path.is_file()]
    return sorted((path, label) for path, label in found if not path.name.startswith("."))


def _rows(kind: str, members: Sequence[Member], encoding: str) -> Iterator[Numbered]:
    position = 0
    for number, (path, label) in enumerate(members, 1):
        position += path.stat().st_size
        row: dict[str, Any] = {kind: str(path)}
        problem = None
        if kind == "text":
            text, problem = _text(path, encoding)
            row = {"text": text, "file": str(path)}
        if label is not None:
            row["label"] = label
        yield Numbered(number, None if problem else row, problem, position=position)


def _text(path: Path, encoding: str) -> tuple[str, Problem | None]:
    """A whole file. Bytes that do not decode are the row's problem, which names the file."""
    read = list(lines(path, encoding))
    problem = next((line.problem for line in read if line.problem), None)
    if problem:
        problem = Problem(problem.code, f"{problem.found} of {path}", problem.expected, problem.todo)
    return "".join(line.text for line in read), problem


def _visible(paths: Iterator[Path]) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith((".", "_")))
