"""Files are written whole or not at all, and nothing that was there is lost."""

import errno
import json
import os

import pytest

from lightsft.errors import OutputError
from lightsft.files import disk_errors, new_folder, read_json, require_free, sha256, write_file, write_json, write_text


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def half(temporary):
        temporary.write_text("hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, half)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "after")
    assert path.read_text() == "after"


def test_json_has_the_same_bytes_whatever_the_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": {"d": "ä", "c": [1.5]}})
    write_json(tmp_path / "b.json", {"a": {"c": [1.5], "d": "ä"}, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": {"c": [1.5], "d": "ä"}, "b": 1}


def test_what_is_no_json_number_is_not_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_folder_that_fails_vanishes(tmp_path, error):
    def fill():
        with new_folder(tmp_path / "deep" / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fill()
    assert not list(tmp_path.rglob("*out*"))


def test_what_an_earlier_crash_left_is_cleared_away(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").touch()
    with new_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_free_when_it_is_not_there_or_empty(tmp_path):
    require_free(tmp_path / "nowhere")
    require_free(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="already exists"):
            require_free(path)


def fail(error):
    with disk_errors(os.devnull):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("Error while serializing: IoError(Os { code: 28, message: No space left on device })"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 39744 vs 39636"),
    ],
    ids=str,
)
def test_a_disk_s_error_says_what_to_do(error):
    with pytest.raises(OutputError, match="cannot write") as caught:
        fail(error)
    assert "free some space" in caught.value.todo
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOENT, "No such file"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught:
        fail(error)
    assert caught.value is error


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(OutputError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
