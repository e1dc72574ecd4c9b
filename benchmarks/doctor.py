"""The data doctor on a large jsonl file, time and memory: python benchmarks/doctor.py

Seeded rows of about 300 to 700 characters (pseudo-words drawn by Zipf's law, four labels, 1 % repeated, 1 % repeated
with a word added), --megabytes of them (1000), are written to a temporary folder and checked in a process of its own;
with --model, lengths are counted in its tokens. Both passes (columns and labels, then the rows) count. Peak: the
largest resident memory, and that after the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS, SEED, BATCH = 30_000, 0, 1000
LABELS = ("arts", "business", "science", "sports")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--model", help="folder or id, for its tokenizer; without it lengths are in words")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check is not None:
        check(options.check, options.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = write(file, options.megabytes * 1_000_000)
        print(f"{rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB", flush=True)
        more = ["--model", options.model] if options.model else []
        subprocess.run([sys.executable, __file__, "--check", str(file), *more], check=True)


def write(file: Path, size: int) -> int:
    """Rows until the file has `size` bytes; how many there are."""
    random = np.random.default_rng(SEED)
    syllables = [
        a + b
        for a in ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "pl"]
        for b in ["a", "e", "i", "o", "u", "ai", "ea", "on", "er", "in"]
    ]
    words = ["".join(random.choice(syllables, size=random.integers(1, 4))) for _ in range(WORDS)]
    weights = 1 / np.arange(1, WORDS + 1)
    rows = 0
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            lengths = random.integers(55, 125, size=BATCH)
            drawn = random.choice(WORDS, size=int(lengths.sum()), p=weights / weights.sum())
            places = np.split(drawn, np.cumsum(lengths)[:-1])
            texts = [" ".join(words[place] for place in part) + "." for part in places]
            for place in range(BATCH // 100):
                texts[100 * place + 1] = texts[100 * place]
                texts[100 * place + 3] = texts[100 * place + 2] + " else"
            labels = random.integers(len(LABELS), size=BATCH)
            labels[1::100] = labels[::100]  # the repeated ones agree
            lines = (json.dumps({"text": t, "label": LABELS[label]}) for t, label in zip(texts, labels, strict=True))
            out.write("\n".join(lines) + "\n")
            rows += BATCH
    return rows


def check(file: Path, model: str | None) -> None:
    from rich.console import Console

    from lightsft.doctor import show
    from lightsft.doctor.sources import check_up

    before, began = peak_megabytes(), time.perf_counter()
    report = check_up(str(file), "classification", model).report
    seconds, rows = time.perf_counter() - began, sum(report.rows.values())
    show(report, Console(width=140))
    print(f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s, {file.stat().st_size / 1e6 / seconds:.1f} MB/s")
    print(f"peak {peak_megabytes():,.0f} MB; the imports alone take {before:,.0f} MB")


def peak_megabytes() -> float:
    """The largest resident memory of this process so far; Linux alone says so without that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
