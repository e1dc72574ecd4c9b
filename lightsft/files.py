"""Writing files so that an interruption or a full disk never leaves half a file, nor loses what was there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightsft.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then move the result into place."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            readable(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def readable(path: Path) -> None:
    """Give a file the permissions that any new file gets here; safetensors makes them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    if path.is_file():
        path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write sorted, indented JSON: the same content gives the same bytes."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_array(path: Path, array: Any) -> None:
    """Write a numpy array, whole or not at all."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array)

    write_file(path, write)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    All of it is on the disk before it gets its name: whenever the machine stops, `path` is whole or not there.
    `path` must not exist or be empty: OutputError otherwise.
    """
    require_free(path)
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                readable(file)
                sync(file)
            sync(temporary)
            if path.exists():
                path.rmdir()
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_free(path: Path) -> None:
    """Raise OutputError if `path` is a file or a folder with something in it, or lies in a model's folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"{path} already exists and is not empty",
            expected="a folder that does not exist yet",
            todo="choose another --out, or move the old one away; nothing is overwritten",
        )
    around = next((one for one in path.resolve().parents if (one / "config.json").is_file()), None)
    if around is not None and any(around.glob("*.safetensors")):
        raise OutputError(
            f"{path} would lie in {around}, which holds a model and travels with what is made of it",
            expected="a folder apart from it",
            todo="choose another --out",
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into an OutputError that names `path`."""
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise OutputError(
            f"cannot write {path}: {reason}",
            expected="a writable folder with enough free space",
            todo="free some space or choose another --out, then run the same command again",
        ) from error


def _disk_reason(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno in (*_FULL, *_CLOSED):
        return os.strerror(error.errno)
    text = str(error)  # safetensors reports the operating system's error as text
    for code in _FULL:
        if f"os error {code}" in text or os.strerror(code) in text:
            return os.strerror(code)
    if "inline_container.cc" in text:  # so does torch.save, without the reason
        return "PyTorch could not write a whole file"
    return None


def read_json(path: Path) -> Any:
    """Parse a JSON file; one that is damaged raises OutputError with its name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OutputError(
            f"{path} is not valid JSON: {error}",
            expected="a file written by lightsft",
            todo="delete or restore it",
        ) from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
