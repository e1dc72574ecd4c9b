"""The zoo sweep: every architecture with every strategy, each pair in a short-lived process of its own.

    python -m tests.zoo.sweep --out runs/zoo.jsonl --jobs 2 --page docs/coverage.md
    python -m tests.zoo.sweep --types llama,mixtral --strategies lora --shard 1/4

One process imports everything, computes nothing, and forks a child for every pair, with a limit on time and memory; a
child that is killed is a failure with that reason. Results are JSON lines, written as they come. A line that was
computed from the same sources is not computed again, so an interrupted sweep goes on where it stopped.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.zoo.coverage_page import LIBRARIES, PLAIN, missed_targets, write_page

ROOT = Path(__file__).parents[2]
STRATEGIES = ("full", "lora", "adapter", "prefix")
SECONDS, WAITING_SECONDS, BYTES = 60, 600, 6 * 2**30  # of a processor, by the clock, of address space
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SOURCES = ("lightsft", "adapters", "tests/zoo")


def main(arguments=None):
    """Run what was asked for, print how it went; returns 1 if a target is missed."""
    options = _options(arguments)
    os.environ |= ENVIRONMENT
    warnings.simplefilter("ignore")
    source = fingerprint()
    rows = [row for row in read(options.out) if row["source"] == source]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        pairs = _missing(_pairs(options), rows)
        for row in run(pairs, jobs=options.jobs) if pairs else ():
            rows.append(row | {"source": source})
            print(json.dumps(rows[-1]), file=file, flush=True)
            _progress(rows)
    wanted = set(map(_name, _pairs(options)))
    rows = [row for row in rows if _name_of(row) in wanted]
    print(f"{options.out}: " + ", ".join(f"{number} {status}" for status, number in _counts(rows).items()))
    if options.page:
        write_page(options.page, rows)
    return int(bool(missed_targets(rows)))


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--strategies", type=split, default=list(STRATEGIES))
    parser.add_argument("--tasks", type=split)
    parser.add_argument("--types", type=split)
    parser.add_argument("--pairs", type=split, help="task/type, ...")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th architecture, beginning with the i-th")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "zoo.jsonl")
    parser.add_argument("--page", type=Path, help="write the coverage page here")
    return parser.parse_args(arguments)


def _pairs(options):
    """(entry, strategy name) of everything asked for; each architecture is also looked at without a strategy."""
    from tests.zoo.models_and_inputs import entries

    shard, shards = map(int, options.shard.split("/"))
    chosen = [
        entry
        for entry in entries()
        if (not options.tasks or entry["task"] in options.tasks)
        and (not options.types or entry["model_type"] in options.types)
        and (not options.pairs or f"{entry['task']}/{entry['model_type']}" in options.pairs)
    ]
    return [(entry, name) for entry in chosen[shard - 1 :: shards] for name in (PLAIN, *options.strategies)]


def _missing(pairs, rows):
    known = set(map(_name_of, rows))
    return [pair for pair in pairs if _name(pair) not in known]


def _name(pair):
    entry, strategy = pair
    return entry["task"], entry["model_type"], strategy


def _name_of(row):
    return row["task"], row["model_type"], row["strategy"]


def fingerprint():
    """A hash of the code whose results these are, and of the libraries it runs on."""
    digest = hashlib.sha256(" ".join(map(version, LIBRARIES)).encode())
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".json")]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read(path):
    """The rows of a results file; a last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run(pairs, *, jobs):
    """The rows of these pairs, each computed in a fork of this process."""
    from tests.zoo.plain import plain_transformers
    from tests.zoo.warm import import_lightsft, import_models

    classes = {entry["model_class"] for entry, _ in pairs}
    with plain_transformers(classes) as plain_logits, TemporaryDirectory() as scratch:
        import tests.zoo.checks  # noqa: F401  what children inherit

        import_lightsft({name for _, name in pairs} - {PLAIN})
        import_models(classes)
        yield from forked(pairs, partial(_compute, plain_logits=plain_logits, scratch=scratch), jobs)


def forked(pairs, compute, jobs):
    """Rows in the order in which their processes end; `compute(pair)` gives the outcome, in a fork of this process."""
    running, waiting = {}, list(reversed(pairs))
    while running or waiting:
        while waiting and len(running) < jobs:
            pair = waiting.pop()
            process, answer = _fork(pair, compute)
            running[process] = pair, answer, time.perf_counter()
        process, status, usage = os.wait4(-1, 0)
        if process not in running:
            raise RuntimeError("the process with plain transformers died")
        pair, answer, started = running.pop(process)
        with os.fdopen(answer) as lines:
            text = lines.read()
        outcome = json.loads(text) if text else _death(os.waitstatus_to_exitcode(status))
        cost = {"peak_bytes": usage.ru_maxrss * 1024, "process_seconds": round(time.perf_counter() - started, 3)}
        yield dict(zip(("task", "model_type", "strategy"), _name(pair), strict=True)) | outcome | cost


def _fork(pair, compute):
    """(process id, descriptor to read its answer from). An answer fits in a pipe's buffer."""
    reads, writes = os.pipe()
    process = os.fork()
    if process:
        os.close(writes)
        return process, reads
    try:
        _limit()
        os.write(writes, json.dumps(compute(pair)).encode())
    finally:
        os._exit(0)


def _limit():
    """The kernel ends this process at a time limit, and refuses it memory over the other; nothing is printed."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)


def _compute(pair, plain_logits, scratch):
    """The outcome of one pair; `scratch` is removed at the end, whatever a killed process leaves there."""
    import torch

    from tests.zoo.checks import check, look

    torch.set_num_threads(1)
    tempfile.tempdir = scratch
    entry, strategy = pair
    try:
        return look(entry) if strategy == PLAIN else check(entry, strategy, plain_logits=plain_logits)
    except Exception as error:
        return {"status": "failed", "step": "build", "reason": f"{type(error).__name__}: {error}"[:1500]}


def _death(code):
    reasons = {
        -signal.SIGPROF: f"killed after {SECONDS} s of processor time",
        -signal.SIGALRM: f"killed after {WAITING_SECONDS} s",
    }
    reason = reasons.get(code, f"the process ended with {code} and no answer")
    return {"status": "failed", "step": "process", "reason": reason}


def _counts(rows):
    counts = Counter(row["status"] for row in rows if row["strategy"] != PLAIN)
    return {status: counts[status] for status in ("passed", "refused", "failed")}


def _progress(rows):
    if sys.stderr.isatty():
        counts = " ".join(f"{number} {status}" for status, number in _counts(rows).items())
        print(f"\r\033[K{len(rows)}  {counts}  {' '.join(_name_of(rows[-1]))}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
