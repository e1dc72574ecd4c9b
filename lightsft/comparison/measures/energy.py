"""Joules that a stretch of work took, read from counters of the hardware.

    CPU    the sum over processor packages of /sys/class/powercap/intel-rapl:*/energy_uj (Linux; AMD's are there too)
    CUDA   the GPU's total energy, from NVML through pynvml where that is installed

Both count everything that runs on that processor or GPU meanwhile, and nothing else of the machine.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
OFTEN = 60.0  # seconds: a package's counter starts again at 0 after some 260,000 J, which takes many minutes


@dataclass(frozen=True)
class Counter:
    """read: a count now. joules: what one of it is. wraps: the count after which it starts again, None for never."""

    read: Callable[[], int]
    joules: float
    wraps: int | None = None


@dataclass
class Energy:
    """source: "rapl", "nvml", or None where nothing can be read. joules: of the whole stretch, once it has ended."""

    source: str | None
    joules: float | None = None


@contextmanager
def energy(device: torch.device, root: Path = RAPL, *, often: float = OFTEN) -> Iterator[Energy]:
    """What the block takes on this device."""
    source, counters = energy_counters(device, root)
    found = Energy(source)
    if not counters:
        yield found
        return
    sums = _Sums(counters)
    ended = threading.Event()
    thread = threading.Thread(target=_look_again, args=(sums, ended, often), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.joules = sums.look()


def energy_source(device: torch.device, root: Path = RAPL) -> str | None:
    """What energy would be read from."""
    return energy_counters(device, root)[0]


def energy_counters(device: torch.device, root: Path = RAPL) -> tuple[str | None, list[Counter]]:
    """("rapl" or "nvml", counters that can be read); (None, none) where there are none."""
    if device.type == "cuda":
        counter = _nvml(device)
        return (None, []) if counter is None else ("nvml", [counter])
    counters = _rapl(root) if device.type == "cpu" else []
    return ("rapl" if counters else None), counters


def _rapl(root: Path) -> list[Counter]:
    """One counter per processor package, or none at all if one of them cannot be read."""
    counters = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if zone.name.count(":") > 1 or not (zone / "name").read_text().startswith("package"):
                continue  # a part of a package, or the whole platform, which counts packages again
            wraps = int((zone / "max_energy_range_uj").read_text())
            counter = Counter(_reader(zone / "energy_uj"), 1e-6, wraps)
            counter.read()
            counters.append(counter)
    except (OSError, ValueError):  # most systems let nobody but root read them
        return []
    return counters


def _reader(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text())


def _nvml(device: torch.device) -> Counter | None:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        identity = torch.cuda.get_device_properties(device).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}".encode())
        counter = Counter(lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)), 1e-3)
        counter.read()
    except (nvml.NVMLError, AttributeError):  # a driver or a GPU that does not count
        return None
    return counter


class _Sums:
    """Adds up what counters moved by since they were last looked at."""

    def __init__(self, counters: list[Counter]) -> None:
        self._counters, self._joules, self._lock = counters, 0.0, threading.Lock()
        self._last = [counter.read() for counter in counters]

    def look(self) -> float | None:
        """Joules since the start; None once a counter cannot be read any more."""
        with self._lock:
            try:
                now = [counter.read() for counter in self._counters]
            except (OSError, ValueError):
                return None
            for counter, before, after in zip(self._counters, self._last, now, strict=True):
                moved = after - before if counter.wraps is None else (after - before) % counter.wraps
                self._joules += moved * counter.joules
            self._last = now
            return self._joules


def _look_again(sums: _Sums, ended: threading.Event, often: float) -> None:
    while not ended.wait(often):
        sums.look()
