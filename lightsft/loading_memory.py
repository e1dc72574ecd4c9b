"""Memory that reading a checkpoint piece by piece leaves behind, given back while it is read.

A map of a file grows a process by every page that is touched once, and the C library keeps what was freed between two
pieces for later. The system can take back the first when memory runs out and never the second; a limit on the process,
or a look at its peak, counts both: quantizing a model while it is loaded would seem to hold the whole checkpoint.

On Linux, `given_back` drops mapped pages as they pile up (MADV_PAGEOUT) and trims the heap (malloc_trim). No value is
lost: a page that is needed again is read again, and one that was written to is not the file's any more and stays. The
system keeps pages of files that the user neither owns nor may write, and those that another process maps too.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS = 0.02  # between two looks at the maps: at 2 GB/s, 40 MB are read in between
TRIM_EVERY = 10  # looks: a trim walks the heap and stops whoever allocates
PAGEOUT = 21  # MADV_PAGEOUT of linux/mman.h, since Linux 5.4


@contextmanager
def given_back(source: str) -> Iterator[None]:
    """Within it, what reading `source` (a folder, or an id in the hub's cache) touches does not pile up."""
    if not sys.platform.startswith("linux"):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_give_back_until, args=(done, _places(source)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _places(source: str) -> tuple[str, ...]:
    """The folders where its files really are: a snapshot in the hub's cache is made of links."""
    folder = Path(source)
    if folder.is_dir():
        found = {file.resolve().parent for file in folder.iterdir()}
    else:
        from huggingface_hub.constants import HF_HUB_CACHE

        found = {Path(HF_HUB_CACHE).resolve()}
    return tuple(f"{path}/" for path in found)


def _give_back_until(done: threading.Event, places: tuple[str, ...]) -> None:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    trim = getattr(library, "malloc_trim", None)  # glibc's own; other C libraries give back by themselves
    looks = 0
    while True:
        last = done.wait(SECONDS)
        looks += 1
        for start, end in _readable(places):
            library.madvise(start, end - start, PAGEOUT)  # an older kernel refuses, and the pages stay
        if trim is not None and (last or looks % TRIM_EVERY == 0):
            trim(0)
        if last:
            return


def _readable(places: tuple[str, ...]) -> list[tuple[int, int]]:
    with suppress(OSError):  # a machine that hides the maps keeps its pages
        return mapped(places)
    return []


def mapped(places: tuple[str, ...]) -> list[tuple[int, int]]:
    """(start, end) of the addresses that files under these folders are mapped to."""
    found = []
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(places):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            found.append((start, end))
    return found
