"""Small results of a comparison, written by hand, and reading a report: its elements, text and tables."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lightsft.comparison.report import write_report
from lightsft.files import write_json

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>|`'
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


def scores(metric: str, value: float) -> dict[str, Any]:
    if metric == "loss":
        return {"loss": value, "perplexity": 2 * value, "token_accuracy": 0.5}
    return {
        "accuracy": value,
        "macro_f1": value - 0.05,
        "loss": 0.7,
        "confusion_matrix": [[40, 10], [20, 30]],
    }


def trial(strategy: str, seed: int, value: float, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seed": seed,
        "status": "finished",
        "error": None,
        "validation": scores(metric, value),
        "test": scores(metric, value + 0.01),
        "trainable_parameters": 147_456,
        "total_parameters": 22_860_672,
        "seconds": 88.1,
        "peak_bytes": 790 * 2**20,
        "adapter_bytes": 600_000,
        "adapter": f"trials/{strategy}-seed{seed}/adapter",
        "learning_rate": 5e-4,
        "options": {"rank": 8},
        "epochs": 2.0,
        "steps": 100,
        "coverage": 1.0,
        "mergeable": True,
    } | changes


def failed(strategy: str, error: str) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seed": 0,
        "status": "failed",
        "error": error,
        "validation": None,
        "test": None,
    }


def row(strategy: str, score: float, parameters: int | None = 147_456, **changes: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seeds": 2,
        "score": score,
        "interval": [score - 0.03, score + 0.03],
        "spread": 0.004,
        "validation_score": score - 0.01,
        "trainable_parameters": parameters,
        "trainable_share": 0.0065,
        "seconds": 88.1,
        "peak_bytes": 790 * 2**20,
        "adapter_bytes": 600_000,
        "mergeable": True,
    } | changes


def comparison(**changes: Any) -> dict[str, Any]:
    """Two strategies with two seeds each: the adapter wins, and lora, which can be merged, is merged."""
    results: dict[str, Any] = {
        "schema": 2,
        "task": "classification",
        "model": "models/tiny-bert",
        "metric": "accuracy",
        "greater_is_better": True,
        "command": "lightsft compare --model models/tiny-bert --seeds 2",
        "config": {"epochs": 2, "strategies": ["adapter", "lora"]},
        "versions": {"python": "3.12.1", "lightsft": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "x86_64", "cores": 2, "memory_bytes": 16 * 2**30, "device": "cpu"},
        "data": {
            "train": 1600,
            "validation": 400,
            "test": 1000,
            "labels": ["bad", "good"],
            "source": "a.csv",
        },
        "trials": [trial(name, seed, 0.7 + seed / 100) for name in ("adapter", "lora") for seed in (0, 1)],
        "baselines": {
            "untuned": {"validation": scores("accuracy", 0.41), "test": scores("accuracy", 0.412)},
            "majority": {"validation": scores("accuracy", 0.45), "test": scores("accuracy", 0.452)},
        },
        "summary": [row("adapter", 0.716, 304_512), row("lora", 0.709)],
        "winner": {
            "strategy": "adapter",
            "seed": 1,
            "adapter": "trials/adapter-seed1/adapter",
            "merged": "merged",
            "merged_strategy": "lora",
            "merged_seed": 0,
            "note": "adapter cannot be merged",
        },
        "certificate": {"passed": True, "inputs": 64, "largest_logit_difference": 2.1e-6},
    }
    return results | changes


def chat() -> dict[str, Any]:
    trials = [trial("lora", 0, 2.2, "loss"), trial("lora", 1, 2.1, "loss"), trial("full", 0, 2.4, "loss")]
    baselines = {
        "untuned": {"validation": scores("loss", 3.1), "test": scores("loss", 3.2)},
        "echo": {"validation": scores("loss", 2.8), "test": scores("loss", 2.9)},
    }
    return comparison(
        task="chat",
        metric="loss",
        greater_is_better=False,
        trials=trials,
        baselines=baselines,
        summary=[row("lora", 2.15), row("full", 2.41)],
        winner={"strategy": "lora", "seed": 1, "adapter": "trials/lora-seed1/adapter", "merged": None},
        certificate=None,
    )


class Page(HTMLParser):
    """A page's elements, its visible text, and its tables as lists of rows of cell texts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self.open):
            return
        self.pieces.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def report(results: dict[str, Any], directory: Path, examples: dict[str, Any] | None = None) -> tuple[str, str, Page]:
    """Both forms of the report, and the page read; `examples` are put where the results say.

    Results that were reported before are not drawn again.
    """
    given = json.dumps([results, examples])
    if given not in _reports:
        if examples is not None:
            write_json(directory / "examples.json", examples)
        markdown, html = (path.read_text(encoding="utf-8") for path in write_report(results, directory))
        _reports[given] = (markdown, html, Page(html))
    return _reports[given]


_reports: dict[str, tuple[str, str, Page]] = {}


def ids(page: Page) -> set[str]:
    """The sections that a page has."""
    return {str(attributes["id"]) for tag, attributes in page.elements if tag in ("h2", "h3") and "id" in attributes}


def summary_names(page: Page) -> list[str]:
    """The first cell of the summary's lines is a number, the strategy and its badges."""
    return [line[0].split()[1] for line in page.tables[0][1:]]


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text, split at the pipes that are not escaped."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
