"""Pages of a file that is mapped are given back, and nothing is lost by it."""

import mmap
import sys
import time
from pathlib import Path

import pytest

from lightsft.loading_memory import given_back, mapped

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIZE = 64 * 2**20


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a file of SIZE bytes that are on the disk."""
    path = tmp_path / "real" / "model.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (SIZE // 256))
        file.flush()
        import os

        os.fsync(file.fileno())
    return path


def resident(folder):
    """Bytes of files under `folder` that are in this process's memory."""
    found, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counted = str(folder) in line
        elif counted and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "links"])
def test_pages_are_given_back_and_read_again(checkpoint, tmp_path, linked):
    folder = checkpoint.parent
    if linked:
        folder = tmp_path / "snapshot"
        folder.mkdir()
        (folder / checkpoint.name).symlink_to(checkpoint)
    with checkpoint.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        total = sum(view[::4096])
        assert resident(checkpoint.parent) > SIZE * 0.9
        with given_back(str(folder)):
            deadline = time.monotonic() + 20
            while resident(checkpoint.parent) > SIZE * 0.1 and time.monotonic() < deadline:
                time.sleep(0.02)
        assert resident(checkpoint.parent) < SIZE * 0.1
        assert sum(view[::4096]) == total


def test_what_was_written_to_a_private_map_is_kept(checkpoint):
    with checkpoint.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        view[:4096] = b"x" * 4096
        with given_back(str(checkpoint.parent)):
            time.sleep(0.2)
        assert view[:4096] == b"x" * 4096


def test_other_files_are_left_alone(checkpoint, tmp_path):
    with checkpoint.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert mapped((f"{checkpoint.parent}/",))
        assert not mapped((f"{tmp_path}/rea/",))


def test_an_error_inside_passes_through(tmp_path):
    with pytest.raises(ValueError, match="broken"), given_back(str(tmp_path)):
        raise ValueError("broken")
