"""The data doctor on a large jsonl file, time and memory: python benchmarks/doctor.py

Seeded rows of about 300 to 700 characters (pseudo-words drawn by Zipf's law, four labels, 1 % repeated, 1 % repeated
with a word added), --megabytes of them (1000), are written to a temporary folder and checked in a process of its own;
with --tokenizer, lengths are counted in its tokens. Peak: the largest resident memory, and that after the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightsft.data.problems import Problem

WORDS, SEED, BATCH = 30_000, 0, 1000
LABELS = ("arts", "business", "science", "sports")


class Row(NamedTuple):
    """What the doctor reads of a row."""

    number: int
    row: Mapping[str, Any]
    problem: None
    position: int


class Labelled:
    """A task with a text and a label."""

    def text_of(self, row: Mapping[str, Any]) -> str:
        return str(row["text"])

    def classes(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["label"]),)

    def problems(self, row: Mapping[str, Any]) -> Iterator[Problem]:
        return iter(())

    def token_problems(self, row: Mapping[str, Any], tokenizer: Any) -> Iterator[Problem]:
        return iter(())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--tokenizer", help="folder or id; without it lengths are in words")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check is not None:
        check(options.check, options.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = write(file, options.megabytes * 1_000_000)
        print(f"{rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB", flush=True)
        more = ["--tokenizer", options.tokenizer] if options.tokenizer else []
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


def read(file: Path) -> Iterator[Row]:
    position = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            position += len(line)
            yield Row(number, json.loads(line), None, position)


def check(file: Path, tokenizer: str | None) -> None:
    from rich.console import Console

    from lightsft.doctor import examine, show

    chosen = None
    if tokenizer:
        from transformers import AutoTokenizer

        chosen = AutoTokenizer.from_pretrained(tokenizer)
    before, began = peak_megabytes(), time.perf_counter()
    report = examine({"train": read(file)}, Labelled(), chosen, 128 if chosen is not None else None)
    seconds, rows = time.perf_counter() - began, sum(report.rows.values())
    show(report, Console(width=140))
    print(f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s, {file.stat().st_size / 1e6 / seconds:.1f} MB/s")
    print(f"peak {peak_megabytes():,.0f} MB, of these {before:,.0f} MB after imports")


def peak_megabytes() -> float:
    """The largest resident memory of this process so far; Linux alone says so without that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
