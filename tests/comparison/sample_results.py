"""A rich results.json with examples.json, drawn at random: every section of the report has something to show.

python -m tests.comparison.sample_results FOLDER      writes both there, and their report
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightsft.comparison.report import write_report
from lightsft.files import write_json

LABELS = ("negative", "neutral", "positive")
SEEDS, SEARCHED, STEPS, TEST = 5, 8, 600, 1000
OPENINGS = ("The room was", "Our waiter seemed", "I found the plot", "Support told me the update is", "Delivery was")
MIDDLES = ("not bad at all", "as good as it gets", "fine, I suppose", "a waste of an evening", "late, yet worth it")
ENDINGS = ("and I would go again.", "but never again!", "says my sister 🙂", "for the price.", "- whatever that means.")


@dataclass(frozen=True)
class Kind:
    """A strategy as this generator draws it."""

    label: str
    score: float
    rate: float
    trainable: int
    mebibytes: float
    seconds: float
    mergeable: bool = True


KINDS = (
    Kind("lora(rank=16)", 0.848, 3e-4, 589_824, 812, 96.0),
    Kind("full", 0.838, 3e-5, 22_713_603, 1460, 171.0),
    Kind("adapter", 0.829, 1e-3, 304_512, 840, 101.0, mergeable=False),
    Kind("ia3", 0.802, 8e-3, 36_867, 796, 88.0),
    Kind("prefix", 0.771, 1e-2, 184_320, 905, 118.0, mergeable=False),
)
BASELINES = {
    "untuned": ("the model with a new head", 0.331),
    "majority": ("always the most frequent training label", 0.412),
    "linear_probe": ("logistic regression on frozen features", 0.764),
    "tfidf": ("TF-IDF of words and pairs of words, logistic regression", 0.788),
}


def sample() -> tuple[dict[str, Any], dict[str, Any]]:
    """results.json and examples.json of a finished comparison: five strategies, five seeds, a search of eight."""
    rng = np.random.default_rng(7)
    trials = [_trial(kind, seed, rng) for kind in KINDS for seed in range(SEEDS)]
    trials[-1] |= {"status": "failed", "error": "FloatingPointError: the loss is NaN at step 212", "test": None}
    trials[-1] |= {"validation": None, "curve": trials[-1]["curve"][:2], "adapter": None, "robustness": None}
    finished = [trial for trial in trials if trial["status"] == "finished"]
    summary = [_summary_row(kind, [t for t in finished if t["strategy"] == kind.label]) for kind in KINDS]
    summary.sort(key=lambda row: -row["validation_score"])
    results = {
        "schema": 2,
        "task": "classification",
        "model": "models/all-MiniLM-L6-v2",
        "command": "lightsft compare --model models/all-MiniLM-L6-v2 --data reviews.csv --text review --label stars"
        " --strategies 'lora(rank=16),full,adapter,ia3,prefix,vera' --tune 8 --seeds 5 --out runs/reviews",
        "config": {"model": "models/all-MiniLM-L6-v2", "epochs": 3.0, "batch_size": 16, "tune": 8, "score_target": 0.8}
        | {"strategies": [{"name": kind.label.split("(")[0], "label": kind.label} for kind in KINDS]},
        "metric": "accuracy",
        "greater_is_better": True,
        "unit": {"scale": 100, "name": "points"},
        "machine": {"processor": "x86_64", "cores": 8, "memory_bytes": 32 * 2**30, "device": "cpu", "dtype": "float32"}
        | {"energy": "rapl"},
        "versions": {"python": "3.12.1", "lightsft": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "hashes": {"data": {"reviews.csv": "9f2c" * 16}, "splits": {"train": "1a" * 32, "test": "2b" * 32}}
        | {"model": "77d0" * 4},
        "warnings": ["the validation split has 400 examples: its scores move by 2 points by chance"],
        "data": {"train": 1600, "validation": 400, "test": TEST, "labels": list(LABELS), "source": "reviews.csv"}
        | {"notes": ["12 rows without a label were left out"], "groups": {"column": "lang", "values": ["de", "en"]}},
        "previews": {"train": [["The room was fine, I suppose", False], ["neutral", True]]},
        "baselines": {name: _baseline(about, score) for name, (about, score) in BASELINES.items()},
        "skipped": [{"strategy": "vera", "reason": "TargetError: its matrices have 3 shapes, VeRA shares one pair"}],
        "search": [_search(kind, rng) for kind in KINDS],
        "trials": trials,
        "summary": summary,
        "comparisons": [*_pairs(summary), *_against_baselines(summary)],
        "non_inferior": {
            "margin": 0.01,
            "best": "lora(rank=16)",
            "within": ["lora(rank=16)"],
            "cheapest": dict.fromkeys(("trainable_parameters", "peak_bytes", "seconds"), "lora(rank=16)"),
            "verdict": "nothing cheaper than lora(rank=16) is shown to be within 1 point of it",
        },
        "few_shot": [_few_shot(kind, shots) for kind in KINDS[:3] for shots in (8, 16, 32, 64)],
        "examples": "examples.json",
        "winner": {
            "strategy": "lora(rank=16)",
            "seed": 3,
            "adapter": "trials/lora_rank=16-seed3/adapter",
            "merged": "merged",
            "merged_strategy": "lora(rank=16)",
            "merged_seed": 3,
            "note": "merged/ holds the winner.",
        },
        "certificate": {"passed": True, "inputs": 64, "largest_logit_difference": 2.1e-6},
    }
    return results, _examples(rng)


def _metrics(score: float, rng: np.random.Generator, examples: int = TEST) -> dict[str, Any]:
    right = [round(score * share * examples) for share in (0.41, 0.25, 0.34)]
    wrong = [round((1 - score) * share * examples / 2) for share in (0.41, 0.25, 0.34)]
    matrix = [[right[i] if i == j else wrong[i] for j in range(3)] for i in range(3)]
    return {"accuracy": score, "macro_f1": score - 0.02, "loss": 1.1 - score, "confusion_matrix": matrix}


def _trial(kind: Kind, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    score, validation = kind.score + rng.normal(0, 0.006), kind.score + 0.004 + rng.normal(0, 0.008)
    seconds = kind.seconds * rng.uniform(0.96, 1.05)
    return {
        "strategy": kind.label,
        "seed": seed,
        "status": "finished",
        "error": None,
        "adapter": f"trials/{kind.label}-seed{seed}/adapter",
        "parameters": {"learning_rate": kind.rate},
        "options": {"rank": 16} if "rank" in kind.label else {},
        "learning_rate": kind.rate,
        "validation": _metrics(validation, rng, 400),
        "test": _metrics(score, rng),
        "curve": [_point(kind, step, seconds, validation, rng) for step in range(60, STEPS + 1, 60)],
        "trainable_parameters": kind.trainable,
        "total_parameters": 22_713_603 + kind.trainable,
        "coverage": 1.0,
        "mergeable": kind.mergeable,
        "skipped": [],
        "seconds": seconds,
        "training_seconds": 0.9 * seconds,
        "tokens": 412_000,
        "tokens_per_second": 412_000 / (0.9 * seconds),
        "seconds_to_target": 0.4 * seconds if kind.score > 0.8 else None,
        "joules": 31 * seconds,
        "peak_bytes": int(kind.mebibytes * 2**20),
        "adapter_bytes": 4 * kind.trainable,
        "epochs": 3.0,
        "steps": STEPS,
        "frozen_cache": None,
        "latency": _latency(kind) if seed == 0 else None,
        "merged": {"validation": validation, "requantized": None} if seed == 0 and kind.mergeable else None,
        "robustness": {change: {"accuracy": score - lost} for change, lost in (("typos", 0.06), ("lowercase", 0.004))},
        "calibration": _calibration(score),
        "forgetting": {"before": 3.21, "after": 3.21 + kind.trainable / 4e8 + 0.01 * seed, "tokens": 20_000},
        "groups": {"de": {"count": 240, "accuracy": score - 0.03}, "en": {"count": 760, "accuracy": score + 0.01}},
    }


def _point(kind: Kind, step: int, seconds: float, final: float, rng: np.random.Generator) -> dict[str, Any]:
    learned = 1 - math.exp(-4.5 * step / STEPS)
    noise = rng.normal(0, 0.008) * (1 - learned)
    return {
        "step": step,
        "epoch": 3 * step / STEPS,
        "tokens": 412_000 * step // STEPS,
        "seconds": seconds * step / STEPS,
        "loss": 1.1 - 0.8 * learned * kind.score + abs(noise),
        "score": 0.41 + (final - 0.41) * learned + noise,
    }


def _latency(kind: Kind) -> dict[str, Any]:
    slow = 4.1 + kind.mebibytes / 900
    merged = {"median_ms": 4.1, "p90_ms": 4.6} if kind.mergeable else None
    return {"adapter": {"median_ms": slow, "p90_ms": 1.1 * slow}, "merged": merged}


def _calibration(score: float) -> dict[str, Any]:
    shares = [(0.45, 40), (0.55, 80), (0.65, 120), (0.75, 160), (0.85, 220), (0.95, 380)]
    bins = [{"confidence": c, "accuracy": max(0.0, c - (0.9 - score) * (c - 0.3)), "count": n} for c, n in shares]
    return {"ece": 0.9 - score, "temperature": 1.3, "ece_after_temperature": (0.9 - score) / 3, "bins": bins}


def _search(kind: Kind, rng: np.random.Generator) -> dict[str, Any]:
    rates = [kind.rate / 3, *(10 ** rng.uniform(-5, -1.5, SEARCHED - 2)), kind.rate]
    trials = []
    for number, rate in enumerate(rates):
        score = kind.score - 0.09 * abs(math.log10(rate / kind.rate)) ** 1.5 + rng.normal(0, 0.004)
        status = "finished" if score > 0.72 else "pruned"
        parameters = {"learning_rate": float(rate), "rank": 8 * 2 ** (number % 3)}
        trials.append(
            {"number": number, "status": status, "parameters": parameters}
            | {"validation": max(score, 0.41) if status == "finished" else None, "steps": 600, "seconds": kind.seconds}
            | {"curve": [[60, 0.41], [120, max(score - 0.05, 0.41)]], "error": None}
        )  # fmt: skip
    trials[4] |= {"status": "failed", "validation": None, "error": "FloatingPointError: the loss is NaN at step 31"}
    return {
        "strategy": kind.label,
        "space": {"learning_rate": {"low": 1e-5, "high": 3e-2, "log": True}, "rank": {"choices": [8, 16, 32]}},
        "default": trials[0]["parameters"],
        "chosen": trials[-1]["parameters"],
        "seed": 1000,
        "trials": trials,
    }


def _summary_row(kind: Kind, trials: list[dict[str, Any]]) -> dict[str, Any]:
    scores = np.array([trial["test"]["accuracy"] for trial in trials])
    error = math.sqrt(scores.var(ddof=1) / len(scores) + kind.score * (1 - kind.score) / TEST)
    median = {
        name: float(np.median([trial[name] for trial in trials]))
        for name in ("seconds", "peak_bytes", "adapter_bytes", "tokens_per_second", "joules")
    }
    latency = trials[0]["latency"]
    return median | {
        "strategy": kind.label,
        "seeds": len(trials),
        "score": float(scores.mean()),
        "interval": [float(scores.mean() - 2 * error), float(scores.mean() + 2 * error)],
        "spread": float(np.ptp(scores)),
        "standard_error": error,
        "degrees_of_freedom": 14.2,
        "variance": {"seeds": float(scores.var(ddof=1)), "examples": 1e-4, "residual": 2e-5},
        "validation_score": float(np.mean([trial["validation"]["accuracy"] for trial in trials])),
        "trainable_parameters": kind.trainable,
        "trainable_share": kind.trainable / trials[0]["total_parameters"],
        "mergeable": kind.mergeable,
        "seconds_to_target": trials[0]["seconds_to_target"],
        "latency_ms": latency["adapter"]["median_ms"],
        "merged_latency_ms": latency["merged"]["median_ms"] if latency["merged"] else None,
        "learning_rate": kind.rate,
        "parameters": {"learning_rate": kind.rate},
        "robustness": {change: float(scores.mean()) - lost for change, lost in (("typos", 0.06), ("lowercase", 0.004))},
        "calibration": {"ece": 0.9 - kind.score, "ece_after_temperature": 0.3 - kind.score / 3},
        "forgetting": float(np.mean([t["forgetting"]["after"] - t["forgetting"]["before"] for t in trials])),
        "groups": {"de": float(scores.mean()) - 0.03, "en": float(scores.mean()) + 0.01},
    }


def _pairs(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = [(first, second) for number, first in enumerate(summary) for second in summary[number + 1 :]]
    return [
        _compared(first["strategy"], second["strategy"], first["score"] - second["score"]) for first, second in pairs
    ]


def _against_baselines(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        _compared(row["strategy"], name, row["score"] - BASELINES[name][1], "baseline")
        for name in ("tfidf", "linear_probe")
        for row in summary
    ]


def _compared(first: str, second: str, difference: float, against: str = "strategy") -> dict[str, Any]:
    half = 0.014
    outcome = "undecided" if abs(difference) < half else "better" if difference > 0 else "worse"
    words = {"better": "beats", "worse": "loses to", "undecided": "shows no detectable difference from"}[outcome]
    interval = [difference - half, difference + half]
    points = f"{100 * difference:+.1f} points [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return {
        "first": first,
        "second": second,
        "difference": difference,
        "interval": interval,
        "standard_error": half / 2.1,
        "degrees_of_freedom": 16.0,
        "p": 0.2 if outcome == "undecided" else 0.0004,
        "p_adjusted": 0.61 if outcome == "undecided" else 0.004,
        "effect_size": difference / 0.008,
        "superiority": 0.5 + float(np.clip(10 * difference, -0.5, 0.5)),
        "outcome": outcome,
        "seeds_needed": 14 if outcome == "undecided" else None,
        "examples_needed": 5200 if outcome == "undecided" else None,
        "detectable": 0.019,
        "verdict": f"{first} {words} {second}: {points}",
        "against": against,
    }


def _few_shot(kind: Kind, shots: int) -> dict[str, Any]:
    score = kind.score - 0.6 / math.sqrt(shots) - 0.02
    return {"strategy": kind.label, "examples": shots, "score": score, "interval": [score - 0.03, score + 0.03]} | {
        "seeds": SEEDS
    }


def _baseline(about: str, score: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    metrics = {split: _metrics(score, rng) for split in ("validation", "test")}
    return {**metrics, "seconds": 1.4, "about": about}


def _examples(rng: np.random.Generator) -> dict[str, Any]:
    rows = []
    for _ in range(300):
        scores = {kind.label: float(rng.integers(0, SEEDS + 1)) / SEEDS for kind in KINDS}
        target = LABELS[rng.integers(3)]
        answers = {label: target if score > 0.5 else LABELS[rng.integers(3)] for label, score in scores.items()}
        text = " ".join(part[rng.integers(len(part))] for part in (OPENINGS, MIDDLES, ENDINGS))
        rows.append({"row": int(rng.integers(TEST)), "text": text, "target": target, "scores": scores}
                    | {"answers": answers, "disagreement": float(np.std(list(scores.values())))})  # fmt: skip
    rows.sort(key=lambda row: -row["disagreement"])
    return {"columns": [kind.label for kind in KINDS], "rows": rows}


def write_sample(folder: Path) -> Path:
    """Write both files and their report; returns the page."""
    results, examples = sample()
    write_json(folder / "results.json", results)
    write_json(folder / "examples.json", examples)
    return write_report(results, folder)[1]


if __name__ == "__main__":
    print(write_sample(Path(sys.argv[1])))
