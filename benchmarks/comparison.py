"""A comparison of strategies against the same trials as separate scripts: python benchmarks/comparison.py

Ours: one `lightsft compare` on the demo's model, rows and epochs (full, lora, adapter, prefix, linear probe; --seeds
3, no search), with all that it does beside the trials: baselines, robustness, latency, statistics, merge, certificate,
report. Theirs: benchmarks/separate_trial.py once per strategy and seed, each a process that imports, tokenizes, loads,
trains, keeps the best epoch and scores the test rows, with the defaults of transformers and PEFT. Both get the same
three files of rows. Each repeat runs both sides whole, in turn, the other one first every second time; wall seconds.

    --seeds 1 --rows 100 --strategies full,lora      a quick look
    --same-rates              theirs with our learning rates: what the defaults alone explain
    --cache-frozen auto       without the kept states of the linear probe (`on` also switches the dropout off there)
    --only ours               one side
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from lightsft.config import RunConfig, build
from lightsft.demo import demo_config
from lightsft.training.prepared import prepare

PACKAGES = ("lightsft", "torch", "transformers", "peft", "datasets", "accelerate")
SCRIPT = Path(__file__).with_name("separate_trial.py")
SPLITS = {"train": 1.0, "validation": 0.25, "test": 0.6}  # rows of each, of --rows


def configured(folder: Path, rows: int, only: Sequence[str], **settings: Any) -> RunConfig:
    """The demo's configuration on three files of its rows, which are written here; `only` these of its strategies."""
    limits = {f"max_{name}_examples": max(10, round(share * rows)) for name, share in SPLITS.items()}
    config = demo_config(folder / "demo").model_copy(update=limits)
    splits = prepare(config).splits.named()
    for name, part in splits.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row[config.text], row[config.label]] for row in part)
    changes = {"data": folder / "train.csv", "encoding": "utf-8", "text": "text", "label": "label"}
    changes |= {f"{name}_data": folder / f"{name}.csv" for name in ("validation", "test")}
    changes |= settings | dict.fromkeys(limits)
    changes["strategies"] = [spec for spec in config.strategies if not only or spec.label in only]
    return build(RunConfig, {**config.model_dump(mode="json"), **changes})


def ours(config: RunConfig, out: Path) -> dict[str, Any]:
    """Wall seconds of the command, and of each trial; test accuracies; the learning rates."""
    settings = {**config.model_dump(mode="json", exclude_none=True), "out": str(out)}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    seconds = _timed([sys.executable, "-m", "lightsft", "compare", str(file)], out.with_suffix(".log"), out.parent)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    failed = [trial["error"] for trial in results["trials"] if trial["status"] != "finished"]
    if failed:
        raise SystemExit(f"trials failed: {failed}")
    trials = [
        {
            "strategy": trial["strategy"],
            "seed": trial["seed"],
            "seconds": trial["seconds"],
            "test": trial["test"]["accuracy"],
            "learning_rate": trial["learning_rate"],
            "frozen_cache": trial.get("frozen_cache"),
        }
        for trial in results["trials"]
    ]
    return {"seconds": seconds, "dtype": results["machine"]["dtype"], "trials": trials}


def theirs(config: RunConfig, folder: Path, out: Path, rates: dict[str, float]) -> dict[str, Any]:
    """The same of one process per trial."""
    common = ["--model", config.model, "--data", str(folder), "--epochs", str(config.epochs)]
    common += ["--batch-size", str(config.batch_size), "--max-length", str(config.max_length)]
    common += ["--evaluation-batch-size", str(config.evaluation_batch_size)]
    trials = []
    for spec in config.strategies:
        for seed in range(config.seeds):
            name = f"{spec.label}-seed{seed}"
            command = [sys.executable, str(SCRIPT), spec.label, "--seed", str(seed), "--out", str(out / name), *common]
            if spec.label in rates:
                command += ["--learning-rate", str(rates[spec.label])]
            out.mkdir(parents=True, exist_ok=True)
            seconds = _timed(command, out / f"{name}.log", folder)
            scores = json.loads((out / name / "scores.json").read_text(encoding="utf-8"))
            trials.append({"strategy": spec.label, "seed": seed, "seconds": seconds, "test": scores["test"]})
    return {"seconds": sum(trial["seconds"] for trial in trials), "dtype": "float32", "trials": trials}


def warm(folder: Path) -> None:
    """Import what either side does, once: compiled modules and their files are there, as on a machine in use."""
    for number, what in enumerate((["-m", "lightsft.comparison.worker"], [str(SCRIPT), "--help"])):
        _timed([sys.executable, *what], folder / f"warm-{number}.log", folder)


def _timed(command: Sequence[str], log: Path, folder: Path) -> float:
    """Wall seconds of a process, from its start to its end. Bytecode and prepared data sets are kept in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    with log.open("w", encoding="utf-8") as file:
        began = time.perf_counter()
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
        seconds = time.perf_counter() - began
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return seconds


def table(runs: Sequence[dict[str, Any]], strategies: Sequence[str]) -> str:
    """Markdown: per strategy the median seconds of a trial and the mean accuracy of each side; then the whole."""
    sides = [side for side in ("ours", "theirs") if side in runs[0]]
    heads = "".join(f" {side}: seconds, test accuracy |" for side in sides)
    lines = [f"| |{heads}", "|---" * (1 + len(sides)) + "|"]
    for strategy in strategies:
        row = f"| {strategy}, a trial |"
        for side in sides:
            own = [trial for run in runs for trial in run[side]["trials"] if trial["strategy"] == strategy]
            seconds, score = statistics.median(t["seconds"] for t in own), statistics.mean(t["test"] for t in own)
            row += f" {seconds:.1f}, {score:.3f} |"
        lines.append(row)
    totals = {side: statistics.median(run[side]["seconds"] for run in runs) for side in sides}
    means = {side: statistics.mean(t["test"] for run in runs for t in run[side]["trials"]) for side in sides}
    whole = "".join(f" {totals[side]:.1f}, {means[side]:.3f} |" for side in sides)
    lines.append(f"| all, from start to end |{whole}")
    if len(sides) == 2:
        ratio, ahead = totals["ours"] / totals["theirs"], means["ours"] - means["theirs"]
        lines.append(f"\nOurs takes {ratio:.2f} of their wall time; mean accuracy {ahead:+.3f}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--strategies", default="", help="only these, comma-separated: full,lora,linear-probe")
    parser.add_argument("--jobs", type=int, default=1, help="our trials at a time")
    parser.add_argument("--cache-frozen", choices=("auto", "on", "off"), default="on")
    parser.add_argument("--same-rates", action="store_true")
    parser.add_argument("--only", choices=("ours", "theirs"))
    parser.add_argument("--out", type=Path, help="folder for logs, runs and benchmark.json; a temporary one by default")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="lightsft-comparison-"))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("seeds", "jobs", "cache_frozen")}
    config = configured(folder, options.rows, options.strategies.split(",") if options.strategies else [], **settings)
    labels = [spec.label for spec in config.strategies]
    warm(folder)
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        sides = [options.only] if options.only else ["ours", "theirs"][:: 1 if repeat % 2 == 0 else -1]
        run = {side: _side(side, config, folder, repeat, options.same_rates) for side in sides}
        runs.append(run)
        print(f"repeat {repeat}: " + ", ".join(f"{side} {run[side]['seconds']:.1f} s" for side in run), flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    machine |= {"memory_bytes": psutil.virtual_memory().total, "python": platform.python_version()}
    versions = {name: version(name) for name in PACKAGES}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    about = {"machine": machine, "versions": versions, "options": given, "runs": runs}
    (folder / "benchmark.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    print(table(runs, labels))
    print(", ".join(f"{name} {value}" for name, value in {**machine, **versions}.items()))
    print(f"written: {folder / 'benchmark.json'}")


def _side(side: str, config: RunConfig, folder: Path, repeat: int, same_rates: bool) -> dict[str, Any]:
    if side == "ours":
        return ours(config, folder / f"ours-{repeat}")
    from lightsft import registry

    rates = {
        spec.label: spec.learning_rate or registry.strategy(spec.name, **spec.options).learning_rate
        for spec in config.strategies
    }
    return theirs(config, folder, folder / f"theirs-{repeat}", rates if same_rates else {})


if __name__ == "__main__":
    main()
