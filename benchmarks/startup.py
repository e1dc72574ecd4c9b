"""How long the command line takes to answer and the package to import: python benchmarks/startup.py

Whole processes, A B A B ..., median of 9.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import lightsft": [sys.executable, "-c", "import lightsft"],
    "lightsft --help": [sys.executable, "-m", "lightsft", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(10):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    for name, measured in times.items():
        print(f"{name:<18} {statistics.median(measured[1:]):.3f} s")


if __name__ == "__main__":
    main()
