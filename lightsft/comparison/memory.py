"""Peak memory of the process since a moment: the accelerator's allocator, or the growth of resident memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Measures from its creation on.

    On CUDA and XPU: the allocator's peak. On a CPU: the highest resident set since then minus the one at the start,
    so the interpreter and the imported libraries are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type in ("cuda", "xpu"):
            getattr(torch, device.type).reset_peak_memory_stats(device)
        else:
            _reset_high_water_mark()
        self.start = int(psutil.Process().memory_info().rss)

    def count(self, held: int) -> None:
        """Count bytes that were there at the start."""
        self.start -= held

    def peak_bytes(self) -> int:
        """Bytes at the highest point so far."""
        if self.device.type in ("cuda", "xpu"):
            return int(getattr(torch, self.device.type).max_memory_allocated(self.device))
        return max(0, _high_water_mark() - self.start)


def _reset_high_water_mark() -> None:
    """Linux forgets the earlier peak when 5 is written here; where that is not allowed, a fork started afresh."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _high_water_mark() -> int:
    """VmHWM on Linux; elsewhere the peak that the operating system keeps for the whole process."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
